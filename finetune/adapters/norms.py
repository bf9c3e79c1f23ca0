"""How large each update is, without ever forming one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finetune.adapters.lora import Adapter, ExpertLora, LoraModule, LoraRouter
from finetune.adapters.sites import Site


@torch.no_grad()
def update_norms(adapter: Adapter) -> dict[str, float]:
    """Frobenius norm of scale · BA by weight, such as `model.layers.0.self_attn.q_proj`; a layer's experts as one."""
    norms: dict[str, float] = {}
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        norms |= _norms_of(site, module)
    return norms


def _norms_of(site: Site, module: LoraModule) -> dict[str, float]:
    if isinstance(module, ExpertLora):
        return {
            f"{site.module}.{name}": module.scale
            * product_norm(module.of_all_experts(f"{part}_a"), module.of_all_experts(f"{part}_b"))
            for name, part in (("gate_up_proj", "gate_up"), ("down_proj", "down"))
        }
    if isinstance(module, LoraRouter) and module.whole:
        return {site.module: float(module.weight_change.float().norm())}
    return {site.module: module.scale * product_norm(module.lora_a, module.lora_b)}


def product_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of b @ a for a [..., L, in] and b [..., out, L], from their L x L Gram matrices."""
    left, right = b.double().mT @ b.double(), a.double() @ a.double().mT
    return math.sqrt(max(0.0, float((left * right).sum())))
