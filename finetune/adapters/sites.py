"""Which places of the model get an adapter: worked out from the shape and the recipe, before any weight is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.derive import lora_scale
from finetune.config.schema import AdapterConfig
from finetune.errors import ConfigError
from finetune.model.shapes import ModelShape

SiteKind = Literal["attention", "experts"]


@dataclass(frozen=True)
class Site:
    """One place an adapter attaches.

    Attributes:
        kind: an attention projection, or a layer's routed experts (both projections).
        layer: layer number from 0.
        module: path in the model, such as `model.layers.0.self_attn.q_proj`.
        rank, alpha: of the update.
        scale: what b @ a is multiplied by: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        num_parameters: trained parameters here.
    """

    kind: SiteKind
    layer: int
    module: str
    rank: int
    alpha: float
    scale: float
    num_parameters: int


def plan_sites(shape: ModelShape, config: AdapterConfig) -> list[Site]:
    """All sites of a recipe, layer by layer.

    Raises:
        ConfigError: the recipe's layers are not the model's.
    """
    first, last = config.layers or (0, shape.num_layers - 1)
    if last >= shape.num_layers:
        raise ConfigError(
            f"adapter.layers is [{first}, {last}], and the base has {shape.num_layers} layers",
            fix=f"layers count from 0; the last is {shape.num_layers - 1}",
        )
    sites: list[Site] = []
    for layer in range(first, last + 1):
        if config.attention.rank:
            sites += [_attention_site(shape, config, layer, target) for target in config.attention.targets]
        if config.experts.rank:
            sites.append(_expert_site(shape, config, layer))
    return sites


def describe_sites(sites: list[Site], shape: ModelShape) -> str:
    """Counts by kind as text, so that "the experts were never trained" cannot go unnoticed."""
    lines = []
    for kind, each in (
        ("attention", "projections"),
        ("experts", f"layers x {shape.num_experts} experts x 2 projections"),
    ):
        here = [site for site in sites if site.kind == kind]
        if not here:
            lines.append(f"  {kind:<10} none")
            continue
        total = sum(site.num_parameters for site in here)
        layers = "" if len({site.layer for site in here}) == shape.num_layers else _layer_range(here)
        lines.append(
            f"  {kind:<10} {len(here)} {each}{layers}, rank {here[0].rank}, scale {here[0].scale:g}: "
            f"{total:,} parameters"
        )
    return "\n".join(lines)


def _layer_range(sites: list[Site]) -> str:
    first, last = sites[0].layer, sites[-1].layer
    return f" in layer {first}" if first == last else f" in layers {first} to {last}"


def _attention_site(shape: ModelShape, config: AdapterConfig, layer: int, target: str) -> Site:
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    inputs, out = {
        "q_proj": (shape.hidden, queries),
        "k_proj": (shape.hidden, keys),
        "v_proj": (shape.hidden, keys),
        "o_proj": (queries, shape.hidden),
    }[target]
    rank = config.attention.rank
    module = f"model.layers.{layer}.self_attn.{target}"
    alpha = config.attention.alpha
    scale = lora_scale(alpha, rank, rslora=config.rslora)
    return Site("attention", layer, module, rank, alpha, scale, rank * (inputs + out))


def _expert_site(shape: ModelShape, config: AdapterConfig, layer: int) -> Site:
    rank = config.experts.rank
    # gate_up reads D and writes 2F, down reads F and writes D.
    per_expert = rank * (2 * shape.hidden + 3 * shape.expert_width)
    module = f"model.layers.{layer}.mlp.experts"
    alpha = config.experts.alpha
    scale = lora_scale(alpha, rank, rslora=config.rslora)
    return Site("experts", layer, module, rank, alpha, scale, per_expert * shape.num_experts)
