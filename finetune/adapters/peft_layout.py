"""The adapter's file layout: exactly what PEFT >= 0.19.1 writes for gpt-oss attention and expert parameters.

PEFT flattens the expert axis into the rank: `lora_A` is expert-major [L·E, in], `lora_B` is rank-major with the expert
fastest [out, L·E]. `experts.base_layer.lora_*` is gate_up_proj and `experts.lora_*` is down_proj, because PEFT wraps
the module once per parameter and gate_up_proj ends up inside. Both are always written: with one target alone the keys
would be `experts.lora_*` whichever it is. down_proj is square in the published models, so no shape check would find a
swap; the read-back (`finetune.adapters.read_back`) compares logits instead.

Shape legend: E experts, L rank, D hidden, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.adapters.sites import Site
from finetune.config.schema import AdapterConfig

PREFIX = "base_model.model."
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def peft_keys(site: Site) -> dict[str, str]:
    """Our parameter name (relative to the site) -> PEFT's key, for one site."""
    path = PREFIX + site.module
    if site.kind == "attention":
        return {"lora_a": f"{path}.lora_A.weight", "lora_b": f"{path}.lora_B.weight"}
    return {
        "gate_up_a": f"{path}.base_layer.lora_A.weight",
        "gate_up_b": f"{path}.base_layer.lora_B.weight",
        "down_a": f"{path}.lora_A.weight",
        "down_b": f"{path}.lora_B.weight",
    }


def to_peft(name: str, factor: Tensor) -> Tensor:
    """One of our factors in PEFT's shape: [E, L, in] -> [L·E, in] for `a`, [E, out, L] -> [out, L·E] for `b`.

    Two-dimensional (attention) factors stay as they are.
    """
    if factor.dim() == 2:
        return factor.contiguous()
    if name.endswith("a"):
        return factor.reshape(-1, factor.shape[2]).contiguous()
    return factor.permute(1, 2, 0).reshape(factor.shape[1], -1).contiguous()


def from_peft(name: str, stored: Tensor, like: torch.Size) -> Tensor:
    """The inverse of `to_peft`; `like` is the shape of our factor.

    Raises:
        ValueError: the stored shape does not belong to a factor of shape `like`.
    """
    expected = to_peft(name, torch.empty(like, device="meta")).shape
    if stored.shape != expected:
        raise ValueError(f"shape {list(stored.shape)} where {list(expected)} is expected")
    if len(like) == 2:
        return stored
    if name.endswith("a"):
        return stored.reshape(like)
    experts, out, rank = like
    return stored.reshape(out, rank, experts).permute(2, 0, 1).contiguous()


def peft_config_fields(config: AdapterConfig) -> dict[str, object]:
    """The fields of PEFT's `LoraConfig` that say what is adapted and how strongly.

    One rank is the default `r`; where experts differ from attention, patterns name them.
    """
    attention, experts = config.attention, config.experts
    rank, alpha = (attention.rank, attention.alpha) if attention.rank else (experts.rank, experts.alpha)
    fields: dict[str, object] = {
        "r": rank,
        "lora_alpha": _plain_number(alpha),
        # vLLM requires the key, and PEFT takes an empty list when parameters are targeted.
        "target_modules": list(attention.targets) if attention.rank else [],
        "lora_dropout": 0.0,
        "bias": "none",
    }
    if experts.rank:
        fields["target_parameters"] = list(EXPERT_PARAMETERS)
        if experts.rank != rank:
            fields["rank_pattern"] = dict.fromkeys(EXPERT_PARAMETERS, experts.rank)
        if experts.alpha != alpha:
            fields["alpha_pattern"] = dict.fromkeys(EXPERT_PARAMETERS, _plain_number(experts.alpha))
    return fields


def _plain_number(value: float) -> float | int:
    """32.0 as 32: PEFT's own files hold integers where they can."""
    return int(value) if value == int(value) else value
