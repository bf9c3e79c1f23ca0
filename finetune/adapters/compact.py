"""An adapter as it was trained: chosen experts only, shared factors once. Small to keep and send; no server reads it.

`finetune adapter import` writes it out again in PEFT's layout, where every expert has factors of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import __version__
from finetune.adapters.lora import Adapter
from finetune.adapters.sites import Site
from finetune.adapters.store import (
    PROVENANCE,
    Factors,
    read_provenance,
    read_router_bias,
    router_bias_changes,
    staged_adapter,
    write_facts,
    write_router_bias,
)
from finetune.errors import InputError
from finetune.files import sha256_of

COMPACT_WEIGHTS = "adapter_compact.safetensors"
SITES = "compact.json"


@dataclass(frozen=True, eq=False)
class CompactAdapter:
    """What `read_compact` found.

    Attributes:
        num_experts: E of the base.
        rslora: how scales were made.
        sites: as they were trained.
        parameters: by site module and name, such as `model.layers.0.mlp.experts.down_b`.
        router_bias: changes of routers' biases by the tensor's name.
        facts: what its finetune.json says of the base.
    """

    num_experts: int
    rslora: bool
    sites: tuple[Site, ...]
    parameters: Mapping[str, Tensor]
    router_bias: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def is_smaller(adapter: Adapter) -> bool:
    """Whether PEFT's layout repeats factors or fills up with zeros."""
    return any(site.experts is not None or site.share != "none" for site in adapter.sites)


def write_compact(
    directory: Path, adapter: Adapter, num_experts: int, *, rslora: bool, facts: Mapping[str, Any]
) -> None:
    """Write an adapter's parameters as they are.

    Args:
        directory: must not exist.
        adapter: trained.
        num_experts: E of the base.
        rslora: scales are alpha / sqrt(rank).
        facts: `base_name`, `base_revision`, `base_identity`.

    Raises:
        InputError: the directory exists.
        MachineError: it cannot be written.
    """
    biases = router_bias_changes(adapter)
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in adapter.parameters().items()
        if not name.endswith(".bias_change")
    }
    with staged_adapter(directory) as staging:
        save_file(tensors, staging / COMPACT_WEIGHTS, metadata={"format": "pt"})
        sites = [asdict(site) for site in adapter.sites]
        write_facts(staging / SITES, {"num_experts": num_experts, "rslora": rslora, "sites": sites})
        write_router_bias(staging, biases)
        files = {path.name: sha256_of(path) for path in sorted(staging.iterdir())}
        written_by = f"gpt-oss-finetune {__version__}"
        write_facts(staging / PROVENANCE, {"written_by": written_by, **facts, "files": files})


def is_compact(directory: Path) -> bool:
    """Whether `write_compact` made a directory."""
    return (directory / COMPACT_WEIGHTS).is_file()


def read_compact(directory: Path) -> CompactAdapter:
    """Read what `write_compact` wrote.

    Raises:
        InputError: it is damaged, or not the files that were written.
    """
    provenance = read_provenance(directory) or {}
    try:
        content = json.loads((directory / SITES).read_text())
        sites = tuple(
            Site(**(site | {key: tuple(value) for key, value in site.items() if isinstance(value, list)}))
            for site in content["sites"]
        )
        tensors = load_file(directory / COMPACT_WEIGHTS)
        num_experts, rslora = int(content["num_experts"]), bool(content["rslora"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{directory} is damaged", why=f"{type(error).__name__}: {error}") from error
    facts = {key: value for key, value in provenance.items() if key.startswith("base_")}
    return CompactAdapter(num_experts, rslora, sites, tensors, read_router_bias(directory), facts)


# The compact form of an adapter as factors of every expert.


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
