"""Put an adapter read from disk on a live base, whatever its layers, ranks and scales: what merges are held against."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

from finetune.adapters.lora import LoraLinear
from finetune.adapters.store import ATTENTION, EXPERTS, ROUTER, AdapterFile, Factors
from finetune.kernels.experts import LoraFactors
from finetune.model.build import Base


class _Experts(nn.Module):
    """Updates of all of one layer's experts; either projection may be missing."""

    adapted = None

    def __init__(self, factors: dict[str, Factors]) -> None:
        super().__init__()
        self.factors = factors

    def gate_up(self) -> LoraFactors | None:
        return self._of("gate_up_proj")

    def down(self) -> LoraFactors | None:
        return self._of("down_proj")

    def _of(self, name: str) -> LoraFactors | None:
        found = self.factors.get(name)
        return None if found is None else LoraFactors(found.a, found.b, found.scale)


@torch.no_grad()
def attach_source(base: Base, source: AdapterFile) -> None:
    """Attach every site of an adapter to a base that has none.

    The router has no update beside its weight here: its weight is changed.
    """
    for number, layer in enumerate(base.model.model.layers):
        attach_layer(layer, source, number, base.device)


@torch.no_grad()
def attach_layer(layer: GptOssDecoderLayer, source: AdapterFile, number: int, device: torch.device) -> None:
    """Attach one layer's sites.

    Args:
        layer: transformers' decoder layer with packed experts.
        source: the adapter.
        number: the layer's.
        device: the layer's.
    """
    factors = {
        name: Factors(found.a.to(device), found.b.to(device), found.scale)
        for name, found in source.layer(number).items()
    }
    for name in ATTENTION:
        if name in factors:
            rank = len(factors[name].a)
            adapted = LoraLinear(getattr(layer.self_attn, name), rank, factors[name].scale, 0.0)
            adapted.lora_a.copy_(factors[name].a)
            adapted.lora_b.copy_(factors[name].b)
            setattr(layer.self_attn, name, adapted)
    if ROUTER in factors:
        weight = layer.mlp.router.weight  # not written into: it may be the mapped file itself
        weight.data = (weight.float() + factors[ROUTER].delta()).to(weight.dtype)
    if (change := source.router_bias.get(f"model.layers.{number}.mlp.router.bias")) is not None:
        bias = layer.mlp.router.bias
        bias.data = (bias.float() + change.to(device)).to(bias.dtype)
    experts = {name: found for name, found in factors.items() if name in EXPERTS}
    if experts:
        layer.mlp.experts.attach(_Experts(experts))
