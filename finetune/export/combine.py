"""Combine adapters of one base into one: exactly, by putting their ranks side by side, or at a lower rank by SVD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import log
from finetune.adapters.store import WEIGHTS, AdapterFile, Factors, open_adapter, warn_held_as, write_peft_directory
from finetune.errors import ConfigError, InputError
from finetune.export.adapters import known_shape
from finetune.export.factors import layers_of, refuse_swapped
from finetune.export.peft import adapts_every_layer, peft_contents
from finetune.files import sha256_of
from finetune.staging import refuse_existing


@dataclass(frozen=True)
class Weighted:
    """One adapter and how much of it is taken."""

    source: AdapterFile
    weight: float


@dataclass(frozen=True)
class RankReduction:
    """What lowering the rank cost at one site: Frobenius norms of the exact update and of what was cut off."""

    layer: int
    name: str
    norm: float
    error: float


def parse_weighted(text: str) -> tuple[Path, float]:
    """Read `DIR:WEIGHT`; DIR alone has weight 1.

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
            f"{text}: {number!r} is no weight",
            why="each adapter is given as DIR:WEIGHT, a finite number other than 0",
            fix="for example: finetune adapter combine runs/a/adapter:0.7 runs/b/adapter:0.3 --out merged",
        )
    return Path(directory), weight


def merge_adapters(parts: Sequence[tuple[Path, float]], out: Path, rank: int | None) -> list[RankReduction]:
    """Write the weighted sum of adapters as a PEFT directory.

    Args:
        parts: directories and weights.
        out: must not exist.
        rank: of the result, at most; None: the sum of the ranks, which is exact but for one rounding of b in float32.

    Returns:
        Per site what the lower rank cost; empty without `rank`.

    Raises:
        ConfigError: `out` exists, or the rank is below 1.
        InputError: an adapter cannot be read, or they do not belong to one base.
    """
    refuse_existing(out)
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank} is below 1")
    adapters = [Weighted(open_adapter(directory), weight) for directory, weight in parts]
    _refuse_different_bases(adapters)
    sources = [adapter.source for adapter in adapters]
    for source in sources:
        refuse_swapped(source, known_shape(source))
    layers: dict[int, dict[str, Factors]] = {}
    costs: list[RankReduction] = []
    numbers = sorted({number for source in sources for number in layers_of(source)})
    with log.Progress("merging", len(numbers), "layers") as progress:
        for number in numbers:
            layers[number] = {}
            for name, factors in _summed(adapters, number).items():
                if rank is not None:
                    factors, cost = _cut(factors, rank, number, name)
                    costs.append(cost)
                layers[number][name] = factors
            progress.advance()
    tensors, fields = peft_contents(layers.items(), every_layer=_every_layer(sources, layers))
    write_peft_directory(out, tensors, fields, _facts(adapters, rank), router_bias=_summed_biases(adapters))
    return costs


def describe_costs(costs: Sequence[RankReduction]) -> list[str]:
    """What re-ranking cost: overall, and the site that lost most."""
    if not costs:
        return []
    total = math.hypot(*(cost.norm for cost in costs))
    lost = math.hypot(*(cost.error for cost in costs))
    worst = max(costs, key=lambda cost: cost.error / (cost.norm or 1))
    return [
        f"re-ranking cut off {lost / (total or 1):.2%} of the update (relative Frobenius error)",
        f"most at layer {worst.layer} {worst.name}: {worst.error / (worst.norm or 1):.2%}",
    ]


def _summed(adapters: Sequence[Weighted], number: int) -> dict[str, Factors]:
    """Exact weighted sums of one layer's updates: ranks side by side, weights and scales inside b."""
    parts: dict[str, list[Factors]] = {}
    for adapter in adapters:
        for name, factors in adapter.source.layer(number).items():
            weighted = Factors(factors.a, factors.b * (factors.scale * adapter.weight), 1.0)
            others = parts.setdefault(name, [])
            if others and (others[0].a.shape[-1], others[0].b.shape[:-1]) != (
                factors.a.shape[-1],
                factors.b.shape[:-1],
            ):
                raise InputError(
                    f"{adapter.source.directory}: {name} of layer {number} has other sizes than the first's"
                )
            others.append(weighted)
    return {
        name: Factors(torch.cat([f.a for f in here], dim=-2), torch.cat([f.b for f in here], dim=-1), 1.0)
        for name, here in parts.items()
    }


def _summed_biases(adapters: Sequence[Weighted]) -> dict[str, Tensor]:
    """Weighted sums of the changes of routers' biases."""
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, change in adapter.source.router_bias.items():
            total[name] = total.get(name, torch.zeros_like(change)) + adapter.weight * change
    return total


def _cut(factors: Factors, rank: int, layer: int, name: str) -> tuple[Factors, RankReduction]:
    """The best update of a rank (Eckart and Young), each expert for itself, its factors of equal size."""
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().mT)
    u, values, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)  # r x r: cheap beside in and out
    values = values * factors.scale
    kept = min(rank, values.shape[-1])
    root = values[..., :kept].sqrt()
    b = (q_b @ u[..., :kept]) * root[..., None, :]
    a = root[..., :, None] * (vt[..., :kept, :] @ q_a.mT)
    cost = RankReduction(layer, name, float(values.norm()), float(values[..., kept:].norm()))
    return Factors(a.float().contiguous(), b.float().contiguous(), 1.0), cost


def _every_layer(sources: Sequence[AdapterFile], layers: dict[int, dict[str, Factors]]) -> bool:
    shapes = [shape for source in sources if (shape := known_shape(source)) is not None]
    whole = any(adapts_every_layer(source, None) for source in sources)
    num_layers = shapes[0].num_layers if shapes else len(layers) if whole else None
    alike = len({frozenset(layer) for layer in layers.values()}) == 1
    return alike and list(layers) == list(range(num_layers or 0))


def _refuse_different_bases(adapters: Sequence[Weighted]) -> None:
    known = {adapter.source.base_identity: adapter.source for adapter in adapters if adapter.source.base_identity}
    if len(known) > 1:
        one, other = list(known.values())[:2]
        raise InputError(
            f"{one.directory} and {other.directory} were trained on different bases",
            why=f"{one.base_name} ({str(one.base_identity)[:12]}) and {other.base_name} "
            f"({str(other.base_identity)[:12]}); updates of one mean nothing to the other",
            fix="merge adapters of one base only",
        )
    for adapter in adapters[1:]:
        warn_held_as(adapters[0].source.base_facts, adapter.source.base_held_as, adapters[0].source.directory)
    if any(adapter.source.base_identity is None for adapter in adapters):
        log.warning("not every adapter records its base: whether they belong together is compared by shapes only")


def _facts(adapters: Sequence[Weighted], rank: int | None) -> dict[str, Any]:
    first = next((a.source for a in adapters if a.source.base_identity), adapters[0].source)
    return {
        **first.base_facts,
        "merged_from": [
            {
                "directory": str(adapter.source.directory.resolve()),
                "weight": adapter.weight,
                "sha256": sha256_of(adapter.source.directory / WEIGHTS),
            }
            for adapter in adapters
        ],
        "merged_to_rank": rank,
    }
