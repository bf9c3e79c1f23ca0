"""The compact form of an adapter: its parameters as trained, adapted experts only and shared factors once.

Small to keep and send; no server reads it. `finetune adapter import` writes it out again in PEFT's layout, where every
expert has factors of its own. Files: adapter_compact.safetensors, compact.json, finetune.json, and router_bias.json
where routers are trained in full.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.adapters.layout import EXPERTS
from finetune.adapters.lora import Adapter, adapted_experts, full_change, full_factor, router_bias_changes
from finetune.adapters.provenance import (
    BaseRecord,
    read_provenance,
    read_router_bias,
    write_provenance,
    write_router_bias,
)
from finetune.adapters.sites import Site
from finetune.errors import InputError
from finetune.files import staged_directory, write_json
from finetune.kernels.experts import LoraFactors

COMPACT_WEIGHTS = "adapter_compact.safetensors"
SITES = "compact.json"


@dataclass(frozen=True, eq=False)
class CompactAdapter:
    """A compact adapter, read.

    Attributes:
        num_experts: E of the base.
        rslora: scales are alpha / sqrt(rank).
        sites: as they were trained.
        parameters: by site module and name, such as `model.layers.0.mlp.experts.down_b`.
        router_bias: changes of routers' biases by the tensor's name.
        base: the base it was trained on.
    """

    num_experts: int
    rslora: bool
    sites: tuple[Site, ...]
    parameters: Mapping[str, Tensor]
    router_bias: Mapping[str, Tensor]
    base: BaseRecord

    def layers(self) -> dict[int, dict[str, LoraFactors]]:
        """Layer -> weight name -> factors of all experts, float32, zeros for experts that are not adapted.

        Raises:
            InputError: a factor is missing or not finite.
        """
        layers: dict[int, dict[str, LoraFactors]] = {}
        for site in self.sites:
            layer = layers.setdefault(site.layer, {})
            if site.kind == "experts":
                for name in EXPERTS:
                    a, b = (self._full_factor(site, f"{name.removesuffix('_proj')}_{factor}") for factor in "ab")
                    layer[name] = LoraFactors(a, b, site.scale)
            elif site.whole:
                layer[site.name] = full_change(self._parameter(site, "weight_change"), site.scale)
            else:
                a, b = (self._parameter(site, f"lora_{factor}") for factor in "ab")
                layer[site.name] = LoraFactors(a, b, site.scale)
        return layers

    def _full_factor(self, site: Site, name: str) -> Tensor:
        adapted = adapted_experts(site, torch.device("cpu"))
        return full_factor(self._parameter(site, name), name, site, self.num_experts, adapted)

    def _parameter(self, site: Site, name: str) -> Tensor:
        key = f"{site.module}.{name}"
        if key not in self.parameters:
            raise InputError(f"the compact adapter lacks {key}")
        if not self.parameters[key].isfinite().all():
            raise InputError(f"the compact adapter's {key} has values that are not finite")
        return self.parameters[key].float()


def is_smaller(adapter: Adapter) -> bool:
    """Whether PEFT's layout repeats factors or adds zeros, so that the compact form is smaller."""
    return any(site.experts is not None or site.share != "none" for site in adapter.sites)


def write_compact(directory: Path, adapter: Adapter, num_experts: int, *, rslora: bool, base: BaseRecord) -> None:
    """Write an adapter's parameters as they are.

    Args:
        directory: must not exist.
        adapter: trained.
        num_experts: E of the base.
        rslora: scales are alpha / sqrt(rank).
        base: the base it was trained on.

    Raises:
        InputError: the directory exists.
        MachineError: it cannot be written.
    """
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in adapter.parameters().items()
        if not name.endswith(".bias_change")
    }
    with staged_directory(directory, "the adapter", file_mode=0o644) as staging:
        save_file(tensors, staging / COMPACT_WEIGHTS, metadata={"format": "pt"})
        sites = [asdict(site) for site in adapter.sites]
        write_json(staging / SITES, {"num_experts": num_experts, "rslora": rslora, "sites": sites})
        write_router_bias(staging, router_bias_changes(adapter))
        write_provenance(staging, base.as_provenance() | {"base_held_as": dict(base.storage)})


def is_compact(directory: Path) -> bool:
    """Whether a directory holds a compact adapter."""
    return (directory / COMPACT_WEIGHTS).is_file()


def read_compact(directory: Path) -> CompactAdapter:
    """Read what `write_compact` wrote.

    Raises:
        InputError: it is damaged, or not the files that were written.
    """
    provenance = read_provenance(directory)
    try:
        content = json.loads((directory / SITES).read_text())
        sites = tuple(
            Site(**(site | {key: tuple(value) for key, value in site.items() if isinstance(value, list)}))
            for site in content["sites"]
        )
        tensors = load_file(directory / COMPACT_WEIGHTS)
        num_experts, rslora = int(content["num_experts"]), bool(content["rslora"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{directory} is damaged", why=f"{type(error).__name__}: {error}") from error
    base = provenance.base if provenance else BaseRecord()
    return CompactAdapter(num_experts, rslora, sites, tensors, read_router_bias(directory), base)
