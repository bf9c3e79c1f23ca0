"""Combine adapters of one base into one: exactly, by concatenating their ranks, or at a lower rank by SVD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import log
from finetune.adapters.config_file import resolve_run
from finetune.adapters.provenance import warn_other_storage
from finetune.adapters.store import WEIGHTS, AdapterFile, write_directory
from finetune.errors import ConfigError, InputError
from finetune.export.base import known_arch
from finetune.export.factors import refuse_swapped
from finetune.export.targets.peft import adapts_every_layer, peft_contents
from finetune.files import refuse_existing, sha256_of
from finetune.kernels.experts import LoraFactors


@dataclass(frozen=True)
class Weighted:
    """An adapter and its weight in the sum."""

    file: AdapterFile
    weight: float


@dataclass(frozen=True)
class RankReduction:
    """The loss at one site from a lower rank: Frobenius norms of the exact update and of what was cut off."""

    layer: int
    name: str
    norm: float
    error: float


def parse_weighted(text: str) -> tuple[Path, float]:
    """Read `RUN:WEIGHT` or `DIR:WEIGHT`; without a weight it is 1.

    Raises:
        ConfigError: the weight is not a number, is not finite, or is 0.
    """
    if ":" not in text or Path(text).is_dir():
        return Path(text), 1.0
    directory, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not directory or not math.isfinite(weight) or weight == 0:
        raise ConfigError(
            f"{text}: {number!r} is not a weight",
            why="each adapter is given as RUN:WEIGHT, a finite number other than 0",
            fix="for example: finetune adapter combine runs/a/adapter:0.7 runs/b/adapter:0.3 --out merged",
        )
    return Path(directory), weight


def combine_adapters(parts: Sequence[tuple[Path, float]], out: Path, rank: int | None) -> list[RankReduction]:
    """Write the weighted sum of adapters as a PEFT directory.

    Args:
        parts: run or adapter directories, and weights.
        out: must not exist.
        rank: of the result, at most; None: the sum of the ranks, which is exact but for one rounding of b in float32.

    Returns:
        The loss at each site from the lower rank; empty without `rank`.

    Raises:
        ConfigError: `out` exists, or the rank is below 1.
        InputError: an adapter cannot be read, or they do not belong to one base.
    """
    refuse_existing(out)
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank} is below 1")
    adapters = [Weighted(AdapterFile.open(resolve_run(path)[0]), weight) for path, weight in parts]
    _refuse_different_bases(adapters)
    files = [adapter.file for adapter in adapters]
    for file in files:
        refuse_swapped(file, known_arch(file))
    layers: dict[int, dict[str, LoraFactors]] = {}
    reductions: list[RankReduction] = []
    numbers = sorted({number for file in files for number in file.layers})
    with log.Progress("merging", len(numbers), "layers") as progress:
        for number in numbers:
            layers[number] = {}
            for name, factors in _summed(adapters, number).items():
                if rank is not None:
                    factors, reduction = _cut(factors, rank, number, name)
                    reductions.append(reduction)
                layers[number][name] = factors
            progress.advance()
    tensors, fields = peft_contents(layers.items(), every_layer=_every_layer(files, layers))
    base = next((file.base for file in files if file.base.identity), files[0].base)
    write_directory(out, tensors, fields, base, _origin(adapters, rank), router_bias=_summed_biases(adapters))
    return reductions


def describe_reductions(reductions: Sequence[RankReduction]) -> list[str]:
    """The loss from a lower rank: overall, and the site that lost most."""
    if not reductions:
        return []
    total = math.hypot(*(each.norm for each in reductions))
    lost = math.hypot(*(each.error for each in reductions))
    worst = max(reductions, key=lambda each: each.error / (each.norm or 1))
    return [
        f"re-ranking cut off {lost / (total or 1):.2%} of the update (relative Frobenius error)",
        f"most at layer {worst.layer} {worst.name}: {worst.error / (worst.norm or 1):.2%}",
    ]


def _summed(adapters: Sequence[Weighted], number: int) -> dict[str, LoraFactors]:
    """Exact weighted sums of one layer's updates: ranks concatenated, weights and scales inside b."""
    parts: dict[str, list[LoraFactors]] = {}
    for adapter in adapters:
        for name, factors in adapter.file.layer(number).items():
            weighted = LoraFactors(factors.a, factors.b * (factors.scale * adapter.weight), 1.0)
            others = parts.setdefault(name, [])
            if others and (others[0].a.shape[-1], others[0].b.shape[:-1]) != (
                factors.a.shape[-1],
                factors.b.shape[:-1],
            ):
                raise InputError(f"{adapter.file.directory}: {name} of layer {number} has other sizes than the first's")
            others.append(weighted)
    return {
        name: LoraFactors(torch.cat([f.a for f in here], dim=-2), torch.cat([f.b for f in here], dim=-1), 1.0)
        for name, here in parts.items()
    }


def _summed_biases(adapters: Sequence[Weighted]) -> dict[str, Tensor]:
    """Weighted sums of the changes of routers' biases."""
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, change in adapter.file.router_bias.items():
            total[name] = total.get(name, torch.zeros_like(change)) + adapter.weight * change
    return total


def _cut(factors: LoraFactors, rank: int, layer: int, name: str) -> tuple[LoraFactors, RankReduction]:
    """The best update of a rank (Eckart and Young), for each expert by itself, with factors of equal size."""
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().mT)
    u, values, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)  # r x r: cheap beside in and out
    values = values * factors.scale
    kept = min(rank, values.shape[-1])
    root = values[..., :kept].sqrt()
    b = (q_b @ u[..., :kept]) * root[..., None, :]
    a = root[..., :, None] * (vt[..., :kept, :] @ q_a.mT)
    reduction = RankReduction(layer, name, float(values.norm()), float(values[..., kept:].norm()))
    return LoraFactors(a.float().contiguous(), b.float().contiguous(), 1.0), reduction


def _every_layer(files: Sequence[AdapterFile], layers: dict[int, dict[str, LoraFactors]]) -> bool:
    archs = [arch for file in files if (arch := known_arch(file)) is not None]
    whole = any(adapts_every_layer(file, None) for file in files)
    num_layers = archs[0].num_layers if archs else len(layers) if whole else None
    alike = len({frozenset(layer) for layer in layers.values()}) == 1
    return alike and list(layers) == list(range(num_layers or 0))


def _refuse_different_bases(adapters: Sequence[Weighted]) -> None:
    files = [adapter.file for adapter in adapters]
    known = {file.base.identity: file for file in files if file.base.identity}
    if len(known) > 1:
        one, other = list(known.values())[:2]
        raise InputError(
            f"{one.directory} and {other.directory} were trained on different bases",
            why=f"{one.base.name} ({str(one.base.identity)[:12]}) and {other.base.name} "
            f"({str(other.base.identity)[:12]}); an update of one means nothing on the other",
            fix="combine adapters of one base only",
        )
    for file in files[1:]:
        warn_other_storage(files[0].base, file.base.storage, files[0].directory)
    if any(file.base.identity is None for file in files):
        log.warning("not every adapter records its base: whether they belong together is compared by shapes only")


def _origin(adapters: Sequence[Weighted], rank: int | None) -> dict[str, Any]:
    """The record of the combined adapters in finetune.json."""
    return {
        "merged_from": [
            {
                "directory": str(adapter.file.directory.resolve()),
                "weight": adapter.weight,
                "sha256": sha256_of(adapter.file.directory / WEIGHTS),
            }
            | ({"ignored_settings": ignored} if (ignored := adapter.file.config.ignored()) else {})
            for adapter in adapters
        ],
        "merged_to_rank": rank,
    }
