"""The compact form of an adapter as factors of every expert."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.adapters.compact import CompactAdapter
from finetune.adapters.sites import Site
from finetune.errors import InputError
from finetune.export.source import Factors


def expanded(adapter: CompactAdapter) -> dict[int, dict[str, Factors]]:
    """Layer -> site name -> factors, zeros for experts that were not adapted.

    Raises:
        InputError: a factor is missing or not finite.
    """
    layers: dict[int, dict[str, Factors]] = {}
    for site in adapter.sites:
        here = layers.setdefault(site.layer, {})
        if site.kind == "experts":
            for name in ("gate_up", "down"):
                a, b = (_of_all(adapter, site, f"{name}_{factor}") for factor in "ab")
                here[f"{name}_proj"] = Factors(a, b, site.scale)
        elif site.whole:
            change = _parameter(adapter, site, "weight_change")
            here["router"] = Factors(change, torch.eye(len(change)) / site.scale, site.scale)
        else:
            a, b = (_parameter(adapter, site, f"lora_{factor}") for factor in "ab")
            here[site.module.rpartition(".")[2]] = Factors(a, b, site.scale)
    return layers


def _of_all(adapter: CompactAdapter, site: Site, name: str) -> Tensor:
    factor = _parameter(adapter, site, name)
    chosen = range(adapter.num_experts) if site.experts is None else site.experts
    if site.ranks is not None:
        factor = _with_one_rank(factor, site, name)
    whole = factor.new_zeros(adapter.num_experts, *factor.shape[1:])
    whole[list(chosen)] = factor.expand(len(chosen), -1, -1)
    return whole


def _with_one_rank(rows: Tensor, site: Site, name: str) -> Tensor:
    """Rows [N, width] of experts whose ranks differ as factors of the highest rank and its scale: B takes the rest."""
    assert site.ranks is not None
    factors = []
    for part, rank, scale in zip(rows.split(site.ranks), site.ranks, site.scales, strict=True):
        padded = torch.cat([part, part.new_zeros(site.rank - rank, part.shape[1])])
        factors.append(padded if name.endswith("_a") else (padded * (scale / site.scale)).T)
    return torch.stack(factors)


def _parameter(adapter: CompactAdapter, site: Site, name: str) -> Tensor:
    key = f"{site.module}.{name}"
    if key not in adapter.parameters:
        raise InputError(f"the compact adapter lacks {key}")
    if not adapter.parameters[key].isfinite().all():
        raise InputError(f"the compact adapter's {key} holds values that are not finite")
    return adapter.parameters[key].float()
