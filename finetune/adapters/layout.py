"""The adapter's file layout: what PEFT >= 0.19.1 writes for gpt-oss attention, router and expert parameters.

PEFT flattens the expert axis into the rank: `lora_A` is expert-major [L·E, in], `lora_B` is rank-major with the expert
fastest [out, L·E]. `experts.base_layer.lora_*` is gate_up_proj and `experts.lora_*` is down_proj, because PEFT wraps
the module once per parameter and gate_up_proj ends up inside. Both are always written: with one target alone the keys
would be `experts.lora_*` whichever it is. down_proj is square in the published models, so no shape check would find a
swap; the read-back (`finetune.adapters.read_back`) compares logits instead.

Shape legend: E experts, L rank, D hidden, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.adapters.sites import Site
from finetune.config.schema import AdapterConfig

PREFIX = "base_model.model."
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER_PARAMETER = "mlp.router.weight"  # no nn.Linear in transformers 5: PEFT reaches it by target_parameters alone
Number = int | float
_LAYER = re.compile(r"^model\.layers\.\d+\.")


def peft_keys(site: Site) -> dict[str, str]:
    """Our parameter name (relative to the site) -> PEFT's key, for one site."""
    path = PREFIX + site.module
    if site.kind != "experts":  # of a router PEFT targets the parameter `weight`, and names its module
        return {"lora_a": f"{path}.lora_A.weight", "lora_b": f"{path}.lora_B.weight"}
    return {
        "gate_up_a": f"{path}.base_layer.lora_A.weight",
        "gate_up_b": f"{path}.base_layer.lora_B.weight",
        "down_a": f"{path}.lora_A.weight",
        "down_b": f"{path}.lora_B.weight",
    }


def to_peft(name: str, factor: Tensor) -> Tensor:
    """One of our factors in PEFT's shape: [E, L, in] -> [L·E, in] for `a`, [E, out, L] -> [out, L·E] for `b`.

    Two-dimensional factors (attention, router) stay as they are.
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


@dataclass(frozen=True)
class Strength:
    """Rank and alpha of one adapted weight."""

    rank: int
    alpha: float


def peft_config_fields(config: AdapterConfig, num_experts: int = 0, expert_rank: int = 0) -> dict[str, object]:
    """The fields of PEFT's `LoraConfig` that say what a recipe adapts and how strongly.

    Args:
        config: the recipe's adapter part.
        num_experts: E of the base: the rank and alpha of a router trained whole; not needed for another.
        expert_rank: the highest of the experts' ranks, where these differ; 0: the recipe's.
    """
    attention, experts, router = config.attention, config.experts, config.router
    weights: dict[str, Strength] = {}
    # With every layer adapted names lose their layer, so one layer stands for all.
    first, last = config.layers or (0, 0)
    for layer in range(first, last + 1):
        path = f"model.layers.{layer}."
        if attention.rank:
            for target in attention.targets:
                weights[f"{path}self_attn.{target}"] = Strength(attention.rank, attention.alpha)
        if router.mode != "frozen":
            whole = router.mode == "full"
            rank, alpha = (num_experts, float(num_experts)) if whole else (router.rank, router.alpha)
            weights[f"{path}{ROUTER_PARAMETER}"] = Strength(rank, alpha)
        if experts.rank:
            for parameter in EXPERT_PARAMETERS:
                weights[path + parameter] = Strength(expert_rank or experts.rank, experts.alpha)
    return lora_config_fields(weights, every_layer=config.layers is None, rslora=config.rslora)


def lora_config_fields(weights: Mapping[str, Strength], *, every_layer: bool, rslora: bool) -> dict[str, object]:
    """The fields of PEFT's `LoraConfig` for any set of adapted weights.

    PEFT's own `layers_to_transform` limits modules but not parameters (PEFT 0.21.2 adapts the experts of all layers),
    so a subset of layers is written as full names. `use_rslora` goes with patterns when loading: the scale is
    alpha / sqrt(rank) with the site's own numbers (PEFT 0.21.2; it refuses the two together only when converting PiSSA
    and the like on saving).

    Args:
        weights: full name -> strength, such as `model.layers.0.self_attn.q_proj`, `model.layers.0.mlp.router.weight`
            or `model.layers.0.mlp.experts.down_proj`; both projections of a layer's experts or neither.
        every_layer: the same weights are adapted in every layer of the model.
        rslora: scales are alpha / sqrt(rank).
    """
    names = {name: _LAYER.sub("", name) if every_layer else name for name in weights}
    parameters = [full for full in names if ".mlp." in full]  # PEFT calls a weight outside an nn.Linear a parameter
    modules = [full for full in names if full not in parameters]
    default = weights[(modules or parameters)[0]]
    fields: dict[str, object] = {
        "r": default.rank,
        "lora_alpha": _plain_number(default.alpha),
        # vLLM requires the key, and PEFT takes an empty list when parameters are targeted.
        "target_modules": list(dict.fromkeys(names[full].removeprefix("self_attn.") for full in modules)),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    if rslora:
        fields["use_rslora"] = True
    if parameters:
        fields["target_parameters"] = list(dict.fromkeys(names[full] for full in parameters))
    if ranks := _pattern({name: strength.rank for name, strength in weights.items()}, default.rank):
        fields["rank_pattern"] = ranks
    if alphas := _pattern({name: _plain_number(s.alpha) for name, s in weights.items()}, _plain_number(default.alpha)):
        fields["alpha_pattern"] = alphas
    return fields


def _pattern(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """Where values differ from the default: by the name without its layer if all layers agree, else by full name."""
    by_name: dict[str, set[Number]] = {}
    for full, value in values.items():
        by_name.setdefault(_LAYER.sub("", full), set()).add(value)
    pattern: dict[str, Number] = {}
    for full, value in values.items():
        name = _LAYER.sub("", full)
        agree = len(by_name[name]) == 1
        if value != default:
            pattern[name if agree else full] = value
    return pattern


def _plain_number(value: float) -> Number:
    """32.0 as 32: PEFT's own files hold integers where they can."""
    return int(value) if value == int(value) else value
