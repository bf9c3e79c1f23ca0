"""Calibration tokens of a rounding, from the adapter's own training data, and the moments that each expert sees.

A routed token counts with the square of its router weight, since that is what its error counts in the layer's output.
An expert with fewer tokens than input dimensions has moments without full rank; it borrows from the layer, the more the
fewer it has: other tokens of the layer are sent through it as well.

Shape legend: T tokens, D hidden, E experts, A active experts per token, R routed tokens, K in features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.arch import Arch
from finetune.config.compose import compose
from finetune.config.schema import RunConfig
from finetune.config.validate import load_run_config
from finetune.data.batches import Batch, collate
from finetune.data.dataset import load_split
from finetune.data.harmony.render import Example
from finetune.data.harmony.tokenizer import check_tokenizer
from finetune.data.packing import pack
from finetune.errors import CheckError, ConfigError, InputError
from finetune.manifest import read_manifest
from finetune.model.checkpoint import Checkpoint

TOKENS_PER_INPUT = 4  # routed tokens per input dimension, with even routing; one works, more than four hardly helps
LEAST_TOKENS = 32_768  # a small model needs few tokens, which would be a few examples of one kind
_BORROWED_PER_INPUT = 2  # tokens borrowed from the layer per input dimension


@dataclass(frozen=True, eq=False)
class Calibration:
    """Examples that a rounding is calibrated on.

    Attributes:
        batches: one packed sequence each.
        num_tokens: of all of them.
        fingerprint: SHA-256 over their token ids: another choice of examples is another rounding.
    """

    batches: tuple[Batch, ...]
    num_tokens: int
    fingerprint: str


def tokens_wanted(arch: Arch) -> int:
    """Tokens that give each expert TOKENS_PER_INPUT routed tokens per input dimension if routing is even."""
    inputs = max(arch.hidden, arch.expert_width)
    return max(LEAST_TOKENS, TOKENS_PER_INPUT * inputs * arch.num_experts // arch.num_active_experts)


def calibration_config(named: str | None, run: Path | None) -> RunConfig:
    """The configuration whose training data an adapter is calibrated on.

    Args:
        named: a run directory or a recipe, as the user gave it; None: the adapter's own run.
        run: that run; None if the adapter belongs to none.

    Raises:
        ConfigError: there is neither, or the recipe cannot be used.
    """
    if named is None and run is None:
        raise ConfigError(
            "compensated rounding needs the data the adapter was trained on, and this adapter belongs to no run",
            why="it keeps the adapter's effect on them; other rounding erases small updates",
            fix="give --calibration RUN_OR_RECIPE, or ask for --rounding nearest",
        )
    directory = run if named is None else Path(named)
    if directory is not None and (directory / "config.yaml").is_file():
        return load_run_config(directory / "config.yaml")
    if directory is not None and directory.is_dir():
        raise ConfigError(f"--calibration {named} is neither a run nor a recipe", fix="give one of the two")
    return compose(str(named)).config


def check_belongs(named: str | None, run: Path | None, identity: str, data: str) -> None:
    """Compare a run's manifest with the base and the training data as they are now.

    Args:
        named, run: as in `calibration_config`; a recipe has no manifest.
        identity: of the base that is merged into.
        data: fingerprint of the training split as it is read now.

    Raises:
        InputError: the run was over another base, or its training data changed.
    """
    directory = run if named is None else Path(named)
    manifest = read_manifest(directory) if directory is not None else {}
    base = manifest.get("base", {}).get("identity", identity)
    if base != identity:
        raise InputError(
            f"{directory} was trained over another base ({base[:12]}), not the one that is merged into "
            f"({identity[:12]})",
            why="its data would be routed and calibrated through another model",
            fix="give --calibration a run over this base, or a recipe",
        )
    recorded = manifest.get("data", {}).get("train", {}).get("fingerprint", data)
    if recorded != data:
        raise InputError(
            f"the training data of {directory} have changed since it was trained: fingerprint {data[:12]}, the run "
            f"recorded {recorded[:12]}",
            why="calibrating on other data costs part of what the adapter learnt",
            fix="restore the data, or give --calibration RECIPE if other data are meant",
        )


def choose_calibration(config: RunConfig, checkpoint: Checkpoint, num_tokens: int | None) -> tuple[Calibration, str]:
    """Draw calibration examples from a configuration's training data, the same ones for the same seed.

    Args:
        config: data and seed.
        checkpoint: the base.
        num_tokens: at least so many, if there are; None: `tokens_wanted`.

    Returns:
        The examples, and the fingerprint of the whole split.

    Raises:
        InputError: the data cannot be read, or the base has another tokenizer.
    """
    check_tokenizer(checkpoint.directory, refuse=True)
    split = load_split(config.data, "train")
    wanted = num_tokens or tokens_wanted(checkpoint.arch)
    chosen = draw_examples(split.examples, wanted, config.data.max_length, config.seed, checkpoint.arch.vocab_size)
    return chosen, split.stats.fingerprint


def draw_examples(
    examples: Sequence[Example], num_tokens: int, sequence_tokens: int, seed: int, vocab_size: int
) -> Calibration:
    """Draw examples until there are enough tokens, and pack them into sequences.

    Raises:
        InputError: a token is not in the base's vocabulary.
    """
    rng = np.random.default_rng([seed, 7])
    chosen: list[Example] = []
    count = 0
    for number in rng.permutation(len(examples)).tolist():
        if count >= num_tokens:
            break
        chosen.append(examples[number])
        count += len(chosen[-1].ids)
    digest = hashlib.sha256()
    for example in chosen:
        digest.update(np.ascontiguousarray(example.ids, dtype=np.int32).tobytes() + b"|")
        largest = int(example.ids.max())
        if largest >= vocab_size:
            raise InputError(
                f"calibration example {example.where} has token {largest}, the base has {vocab_size} tokens",
                why="the examples were made with another tokenizer than the base's",
                fix="give --calibration a run or recipe for this base",
            )
    sequences = pack([len(example.ids) for example in chosen], sequence_tokens, rng)
    batches = tuple(collate([[chosen[number] for number in sequence]]) for sequence in sequences)
    return Calibration(batches, count, digest.hexdigest())


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of a layer's experts, without padding.

    Attributes:
        x: [T, D], in the compute dtype.
        expert_ids: int64 [T, A].
        weights: [T, A], the router's.
    """

    x: Tensor
    expert_ids: Tensor
    weights: Tensor

    def routed_to(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens routed to an expert, int64 [R], and their squared router weights, float32 [R]."""
        tokens, slots = (self.expert_ids == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, slots].float().square()


@dataclass(frozen=True)
class ExpertInputs:
    """One expert's calibration tokens: its own first, then those borrowed from the layer.

    Attributes:
        x: float32 [R, D].
        weights: float32 [R], sum 1.
        num_own: tokens that the router sent.
        mass: sum of their squared router weights: what the expert counts in the layer.
    """

    x: Tensor
    weights: Tensor
    num_own: int
    mass: float


def expert_inputs(inputs: LayerInputs, expert: int) -> ExpertInputs:
    """Tokens of one expert, topped up from the layer if it has fewer than D; none if the router sent it none.

    Its own then have a share of R / D of the weight, the borrowed ones the rest.
    """
    tokens, weights = inputs.routed_to(expert)
    size, own = inputs.x.shape[1], len(tokens)
    mass = float(weights.sum())
    weights = weights / mass if own else weights
    if 0 < own < size:
        count = min(len(inputs.x), _BORROWED_PER_INPUT * size)
        borrowed = torch.arange(count, device=tokens.device) * len(inputs.x) // count  # spread evenly: no seed
        tokens = torch.cat((tokens, borrowed))
        share = own / size
        weights = torch.cat((weights * share, torch.full((count,), (1 - share) / count, device=weights.device)))
    return ExpertInputs(inputs.x[tokens].float(), weights, own, mass)


def moments(x: Tensor, weights: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Mean [K] and second moments about it [K, K] of weighted inputs.

    Args:
        x: float32 [R, K].
        weights: [R], sum 1 (or R = 0, which gives zeros).
        where: layer, projection and experts, for the error.

    Raises:
        CheckError: a value is not finite.
    """
    mean = weights @ x
    centred = (x - mean) * weights.sqrt()[:, None]
    second = centred.mT @ centred
    if not bool(second.isfinite().all()):
        raise CheckError(
            f"{where}: inputs on calibration data are not finite",
            why="base + adapter leaves the range of the compute dtype there, so there is nothing to round for",
            fix="evaluate the adapter first (finetune evaluate); round with --rounding nearest to look at the weights",
        )
    return mean, second
