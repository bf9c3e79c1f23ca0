"""Which rows a merge is calibrated on: the run's own training rows, checked to be what the adapter was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.arch import Arch
from finetune.config.compose import compose
from finetune.config.paths import shipped_dir
from finetune.config.schema import RunConfig
from finetune.config.validate import load_run_config
from finetune.data.batches import Batch, collate
from finetune.data.dataset import load_split
from finetune.data.harmony.render import Example
from finetune.data.harmony.tokenizer import FIRST_CONTROL_ID, TOKENIZER_JSON_SHA256
from finetune.data.packing import pack
from finetune.errors import CheckError, ConfigError, InputError
from finetune.model.checkpoint import Checkpoint

ROWS_PER_INPUT = 4  # routed rows for each input dimension, with even routing; one works, more than four hardly helps
LEAST_TOKENS = 32_768  # a small model asks for few rows, which would be a few samples of one kind


@dataclass(frozen=True, eq=False)
class Calibration:
    """Rows that a rounding is calibrated on.

    Attributes:
        batches: one packed row each.
        num_tokens: of all of them.
        fingerprint: sha256 over their token ids: another choice of rows is another rounding.
    """

    batches: tuple[Batch, ...]
    num_tokens: int
    fingerprint: str


def tokens_wanted(shape: Arch) -> int:
    """Tokens that give each expert ROWS_PER_INPUT routed rows for each input dimension if routing is even."""
    inputs = max(shape.hidden, shape.expert_width)
    return max(LEAST_TOKENS, ROWS_PER_INPUT * inputs * shape.num_experts // shape.num_active_experts)


def calibration_config(named: str | None, run: Path | None) -> RunConfig:
    """The configuration whose training data an adapter is calibrated on.

    Args:
        named: a run directory or a recipe, as the person gave it; None: the adapter's own run.
        run: that run; None if the adapter belongs to none.

    Raises:
        ConfigError: there is neither, or the recipe cannot be used.
    """
    if named is None and run is None:
        raise ConfigError(
            "compensated rounding needs the rows the adapter was trained on, and this adapter belongs to no run",
            why="it keeps what the adapter does on them; other rounding erases small updates",
            fix="give --calibration RUN_OR_RECIPE, or ask for --rounding nearest",
        )
    directory = run if named is None else Path(named)
    if directory is not None and (directory / "config.yaml").is_file():
        return load_run_config(directory / "config.yaml")
    if directory is not None and directory.is_dir():
        raise ConfigError(f"--calibration {named} is neither a run nor a recipe", fix="give one of the two")
    return compose(str(named)).config


def check_belongs(named: str | None, run: Path | None, identity: str, data: str) -> None:
    """Compare what a run recorded with the base and the training data of now.

    Args:
        named, run: as in `calibration_config`; a recipe records nothing.
        identity: of the base that is merged into.
        data: fingerprint of the training split as it is read now.

    Raises:
        InputError: the run was over another base, or its training data changed.
    """
    directory = run if named is None else Path(named)
    manifest: dict[str, Any] = {}
    if directory is not None and (directory / "manifest.json").is_file():
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    base = manifest.get("base", {}).get("identity", identity)
    if base != identity:
        raise InputError(
            f"{directory} was trained over another base ({base[:12]}), not the one that is merged into "
            f"({identity[:12]})",
            why="its rows would be routed and calibrated through another model",
            fix="give --calibration a run over this base, or a recipe",
        )
    recorded = manifest.get("data", {}).get("train", {}).get("fingerprint", data)
    if recorded != data:
        raise InputError(
            f"the training data of {directory} are not what it was trained on: fingerprint {data[:12]}, the run "
            f"recorded {recorded[:12]}",
            why="calibrating on other rows costs part of what the adapter learnt",
            fix="restore the data, or give --calibration RECIPE to say that other rows are meant",
        )


def choose_rows(config: RunConfig, checkpoint: Checkpoint, num_tokens: int | None) -> tuple[Calibration, str]:
    """Pick calibration rows from a configuration's training data, the same for the same seed.

    Args:
        config: data and seed.
        checkpoint: the base.
        num_tokens: at least so many, if there are; None: `tokens_wanted`.

    Returns:
        The rows, and the fingerprint of the whole split.

    Raises:
        InputError: the data cannot be read, or the base has another tokenizer.
    """
    require_tokenizer(checkpoint.directory)
    split = load_split(config.data, "train")
    wanted = num_tokens or tokens_wanted(checkpoint.arch)
    return pick(split.examples, wanted, config.data.max_length, config.seed, checkpoint.arch.vocab_size), (
        split.stats.fingerprint
    )


def pick(samples: Sequence[Example], num_tokens: int, row_tokens: int, seed: int, vocab_size: int) -> Calibration:
    """Draw samples until there are enough tokens, and pack them.

    Raises:
        InputError: a token is not in the base's vocabulary.
    """
    rng = np.random.default_rng([seed, 7])
    chosen: list[Example] = []
    count = 0
    for number in rng.permutation(len(samples)).tolist():
        if count >= num_tokens:
            break
        chosen.append(samples[number])
        count += len(chosen[-1].ids)
    digest = hashlib.sha256()
    for sample in chosen:
        digest.update(np.ascontiguousarray(sample.ids, dtype=np.int32).tobytes() + b"|")
        if int(sample.ids.max()) >= vocab_size:
            raise InputError(
                f"calibration row {sample.where} has token {int(sample.ids.max())}, the base has {vocab_size} tokens",
                why="the rows were made with another tokenizer than the base's",
                fix="give --calibration a run or recipe for this base",
            )
    rows = pack([len(sample.ids) for sample in chosen], row_tokens, rng)
    batches = tuple(collate([[chosen[number] for number in row]]) for row in rows)
    return Calibration(batches, count, digest.hexdigest())


def require_tokenizer(directory: Path) -> None:
    """Check that a base's tokenizer.json, if it has one, is the published one, in which rows are rendered.

    Raises:
        InputError: it has other tokens.
    """
    path = directory / "tokenizer.json"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() == TOKENIZER_JSON_SHA256:
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    special = json.loads((shipped_dir("data") / "tokenizer" / "special_tokens.json").read_text())["hf_added_tokens"]
    found = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    if len(tokenizer["model"]["vocab"]) != FIRST_CONTROL_ID or any(found.get(k) != v for k, v in special.items()):
        raise InputError(
            f"{path} is another tokenizer than gpt-oss's",
            why="training rows are rendered with o200k_harmony; this base would read other words in the same ids",
            fix="export with --rounding nearest, or put the published tokenizer.json there if the file is wrong",
        )


# What each expert's matrices see: weighted mean and second moments of their inputs on calibration rows.
#
# A routed row counts with the square of its router weight, since that is what its error counts in the layer's output.
# An expert with fewer rows than input dimensions has moments without full rank; it borrows from the layer, the more the
# fewer rows it has: other tokens of the layer are sent through it as well.
#
# Shape legend: T tokens, D hidden, E experts, A active experts a token, R routed rows, F expert width, K in features.

_BORROWED_PER_INPUT = 2  # tokens borrowed from the layer for each input dimension


@dataclass(frozen=True)
class LayerInputs:
    """What a layer's experts received, padding left out.

    Attributes:
        x: [T, D], in the compute dtype.
        expert_ids: int64 [T, A].
        weights: [T, A], the router's.
    """

    x: Tensor
    expert_ids: Tensor
    weights: Tensor

    def rows_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens that an expert received, int64 [R], and their squared router weights, float32 [R]."""
        tokens, slots = (self.expert_ids == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, slots].float().square()

    def counts(self, num_experts: int) -> Tensor:
        """Routed rows of each expert, int64 [E], on the CPU."""
        return torch.bincount(self.expert_ids.reshape(-1), minlength=num_experts).cpu()


@dataclass(frozen=True)
class ExpertRows:
    """One expert's calibration rows: own ones first, then those borrowed from the layer.

    Attributes:
        x: float32 [R, D].
        weights: float32 [R], sum 1.
        num_own: how many the router sent.
        mass: sum of their squared router weights: what the expert counts in the layer.
    """

    x: Tensor
    weights: Tensor
    num_own: int
    mass: float


def expert_rows(inputs: LayerInputs, expert: int) -> ExpertRows:
    """Rows of one expert, topped up from the layer if it has fewer than D; none if the router sent it none.

    Own rows keep a share of R / D of the weight then, the borrowed ones get the rest.
    """
    tokens, weights = inputs.rows_of(expert)
    size, own = inputs.x.shape[1], len(tokens)
    mass = float(weights.sum())
    weights = weights / mass if own else weights
    if 0 < own < size:
        count = min(len(inputs.x), _BORROWED_PER_INPUT * size)
        borrowed = torch.arange(count, device=tokens.device) * len(inputs.x) // count  # spread evenly: no seed
        tokens = torch.cat((tokens, borrowed))
        share = own / size
        weights = torch.cat((weights * share, torch.full((count,), (1 - share) / count, device=weights.device)))
    return ExpertRows(inputs.x[tokens].float(), weights, own, mass)


def moments(x: Tensor, weights: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Mean [K] and second moments about it [K, K] of weighted rows.

    Args:
        x: float32 [R, K].
        weights: [R], sum 1 (or R = 0, which gives zeros).
        where: layer, projection and expert, for the error.

    Raises:
        CheckError: a value is not finite.
    """
    mean = weights @ x
    centred = (x - mean) * weights.sqrt()[:, None]
    second = centred.mT @ centred
    if not bool(second.isfinite().all()):
        raise CheckError(
            f"{where}: inputs on calibration rows are not finite",
            why="base + adapter leaves the range of the compute dtype there, so there is nothing to round for",
            fix="evaluate the adapter first (finetune evaluate); round with --rounding nearest to look at the weights",
        )
    return mean, second
