"""`finetune adapter show`: the sites of an adapter, their ranks and scales, and the sizes of the updates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from finetune.adapters.lora import squared_norm
from finetune.adapters.store import AdapterFile
from finetune.kernels.experts import LoraFactors


@dataclass(frozen=True)
class SiteMeasurement:
    """One site, measured.

    Attributes:
        layer, name: of the weight.
        rank, scale: of its update.
        num_experts: 0 for attention and the router.
        norm: Frobenius norm of the update scale · b @ a, over all experts.
        largest_expert_norm: of a single expert; None without experts.
        untouched_experts: number of experts whose update is exactly zero; None without experts.
        ranks_in_use: number of ranks with an update, by expert; None without experts.
        num_parameters: in both factors.
    """

    layer: int
    name: str
    rank: int
    scale: float
    num_experts: int
    norm: float
    largest_expert_norm: float | None
    untouched_experts: int | None
    ranks_in_use: tuple[int, ...] | None
    num_parameters: int


def measure(adapter: AdapterFile) -> list[SiteMeasurement]:
    """Read every site, one at a time.

    Raises:
        InputError: a value is not finite.
    """
    measured = []
    for site in adapter.sites:
        factors = adapter.read(site)
        squared = squared_norm(factors)
        per_expert = squared.sqrt() if site.num_experts else None
        measured.append(
            SiteMeasurement(
                site.layer,
                site.name,
                site.rank,
                site.scale,
                site.num_experts,
                float(squared.sum().sqrt()),
                None if per_expert is None else float(per_expert.max()),
                None if per_expert is None else int((per_expert == 0).sum()),
                _ranks_in_use(factors) if site.num_experts else None,
                factors.a.numel() + factors.b.numel(),
            )
        )
    return measured


def as_json(adapter: AdapterFile, sites: list[SiteMeasurement]) -> dict[str, Any]:
    """All of it as JSON."""
    return {
        "directory": str(adapter.directory),
        "base_name": adapter.base.name,
        "base_revision": adapter.base.revision,
        "base_identity": adapter.base.identity,
        "base_held_as": dict(adapter.base.storage),
        "peft_version": adapter.config.peft_version,
        "use_rslora": adapter.config.use_rslora,
        "num_parameters": sum(site.num_parameters for site in sites),
        "norm": math.hypot(*(site.norm for site in sites)),
        "sites": [asdict(site) for site in sites],
    }


def as_lines(adapter: AdapterFile, sites: list[SiteMeasurement]) -> list[str]:
    """A few lines and a table with one row for each kind of site."""
    identity = (adapter.base.identity or "not recorded")[:12]
    revision = f" at {adapter.base.revision}" if adapter.base.revision else ""
    parameters = sum(site.num_parameters for site in sites)
    scale = "alpha / sqrt(rank), rsLoRA" if adapter.config.use_rslora else "alpha / rank"
    lines = [
        f"{adapter.directory}: {parameters:,} parameters in {len(sites)} sites, scale = {scale}",
        f"base: {adapter.base.name or 'not named'}{revision}, identity {identity}",
        *(
            f"trained over {part} in {change['format']}, {float(change['relative_rms']):.1%} off the checkpoint's"
            for part, change in adapter.base.storage.items()
        ),
        f"{'site':<13} {'layers':<12} {'rank':>5} {'scale':>8} {'norm':>10}  largest",
    ]
    for name in dict.fromkeys(site.name for site in sites):
        here = [site for site in sites if site.name == name]
        norm = math.hypot(*(site.norm for site in here))
        largest = max(here, key=lambda site: site.norm)
        row = f"{name:<13} {_ranges(site.layer for site in here):<12} {_span(s.rank for s in here):>5} "
        row += f"{_span(s.scale for s in here):>8} {norm:>10.4g}  {largest.norm:.4g} in layer {largest.layer}"
        if here[0].num_experts:
            untouched = sum(site.untouched_experts or 0 for site in here)
            row += f"; {untouched} of {sum(site.num_experts for site in here)} experts have none{_used(here)}"
        lines.append(row)
    return lines


def _ranks_in_use(factors: LoraFactors) -> tuple[int, ...]:
    """Of each expert, ranks whose row of A [E, L, in] and column of B [E, out, L] are both not zero."""
    used = factors.a.any(2) & factors.b.any(1)
    return tuple(int(count) for count in used.sum(1))


def _used(sites: list[SiteMeasurement]) -> str:
    """Describe the ranks in use, unless every expert with an update has the site's."""
    ranks = [rank for site in sites for rank in site.ranks_in_use or () if rank]
    if not ranks or all(rank == sites[0].rank for rank in ranks):
        return ""
    return f"; ranks {min(ranks)} to {max(ranks)} in use, {sum(ranks):,} together"


def _span(values: Iterable[float]) -> str:
    low, *others = sorted(set(values))
    return f"{low:.4g}-{others[-1]:.4g}" if others else f"{low:.4g}"


def _ranges(layers: Iterable[int]) -> str:
    """Layer numbers as `0-3,7`."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
