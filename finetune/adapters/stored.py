"""Between what is trained and what files hold: a pair of factors for every site, for every expert.

Files of others know neither a factor that experts share, nor experts without an update, nor a router trained whole. So
a shared factor is written for each expert, an expert that is not adapted gets zeros, and the change of a whole router's
weight becomes the product of a unit matrix (over the scale) and itself. The change of its bias has no place there at
all: it goes into a JSON file beside, and merges carry it.

Shape legend: E experts, L rank, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.lora import Adapter, ExpertLora, LoraModule, LoraRouter, lora_parameters
from finetune.adapters.sites import Site
from finetune.errors import InputError

ROUTER_BIAS = "router_bias.json"  # not safetensors: SGLang reads every such file of a directory


def stored_factors(site: Site, module: LoraModule) -> dict[str, Tensor]:
    """A site's factors as files hold them, detached: of all E experts, and of a whole router a [E, D], b [E, E]."""
    if isinstance(module, ExpertLora):
        return {name: module.of_all_experts(name).detach() for name in lora_parameters(module)}
    if isinstance(module, LoraRouter) and module.whole:
        change = module.weight_change.detach().float()
        return {"lora_a": change, "lora_b": torch.eye(len(change), device=change.device) / site.scale}
    return {name: parameter.detach() for name, parameter in lora_parameters(module).items()}


@torch.no_grad()
def fill(site: Site, module: LoraModule, stored: Mapping[str, Tensor]) -> None:
    """Set a site's parameters from factors as files hold them: the inverse of `stored_factors`.

    Raises:
        ValueError: an expert that is not adapted here has an update, or one beyond its rank, or a factor that is shared
            here differs among experts.
    """
    if isinstance(module, LoraRouter) and module.whole:
        module.weight_change.copy_(stored["lora_b"].float() @ stored["lora_a"].float() * site.scale)
        return
    for name, parameter in lora_parameters(module).items():
        factor = stored[name]
        parameter.copy_(module.from_all_experts(name, factor) if isinstance(module, ExpertLora) else factor)


def router_bias_changes(adapter: Adapter) -> dict[str, Tensor]:
    """The changes of routers' biases by the tensor's name, float32 [E] each; empty unless routers are trained whole."""
    return {
        f"{site.module}.bias": module.bias_change.detach().float().cpu()
        for site, module in zip(adapter.sites, adapter.modules, strict=True)
        if isinstance(module, LoraRouter) and module.whole
    }


def write_router_bias(directory: Path, changes: Mapping[str, Tensor]) -> None:
    """Write `router_bias.json` into an adapter directory; nothing if there is no change."""
    if changes:
        content = {name: change.tolist() for name, change in changes.items()}
        (directory / ROUTER_BIAS).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_router_bias(directory: Path) -> dict[str, Tensor]:
    """Read `router_bias.json`; empty without it.

    Raises:
        InputError: it cannot be read, or a value is not finite.
    """
    path = directory / ROUTER_BIAS
    if not path.is_file():
        return {}
    try:
        changes = {str(name): torch.tensor(values, dtype=torch.float32) for name, values in _object(path).items()}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from error
    for name, change in changes.items():
        if change.dim() != 1 or not change.isfinite().all():
            raise InputError(f"{path}: {name} is not a list of finite numbers")
    return changes


def _object(path: Path) -> dict[str, list[float]]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError("it holds no names")
    return content
