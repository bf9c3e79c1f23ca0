"""Which places of the model get an adapter: worked out from the shape and the recipe, before any weight is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from finetune.config.derive import lora_scale
from finetune.config.schema import AdapterConfig
from finetune.errors import ConfigError
from finetune.model.shapes import ModelShape

SiteKind = Literal["attention", "router", "experts"]
Share = Literal["none", "a", "b"]
Selection = Mapping[int, tuple[int, ...]]
"""Layer -> the experts that are adapted in it, in order."""
ExpertRanks = Mapping[int, Mapping[int, int]]
"""Layer -> expert -> rank, of the adapted ones, in order."""


@dataclass(frozen=True)
class Site:
    """One place an adapter attaches.

    Attributes:
        kind: an attention projection, a layer's router, or its routed experts (both projections).
        layer: layer number from 0.
        module: path in the model, such as `model.layers.0.self_attn.q_proj`.
        rank, alpha: of the update. Where experts' ranks differ, the highest of all layers', which files have.
        scale: what b @ a is multiplied by: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        num_parameters: trained parameters here.
        experts: those adapted, of an experts' site; None: all of them.
        share: which factor the experts of a layer have in common.
        ranks, scales: of each adapted expert where they differ; None and empty: `rank` and `scale`.
        whole: a router whose weight and bias are trained as they are, not as factors; `rank` is what its export takes.
    """

    kind: SiteKind
    layer: int
    module: str
    rank: int
    alpha: float
    scale: float
    num_parameters: int
    experts: tuple[int, ...] | None = None
    share: Share = "none"
    whole: bool = False
    ranks: tuple[int, ...] | None = None
    scales: tuple[float, ...] = ()


def plan_sites(
    shape: ModelShape, config: AdapterConfig, selection: Selection | None = None, ranks: ExpertRanks | None = None
) -> list[Site]:
    """All sites of a recipe, layer by layer.

    Args:
        shape: of the base.
        config: the recipe's adapter part.
        selection: which experts each layer adapts. None: all.
        ranks: of these experts, where `adapter.experts.rank_by` has them differ. None: the recipe's rank for each.

    Raises:
        ConfigError: the recipe's layers are not the model's, or the selection leaves one without an expert.
    """
    first, last = config.layers or (0, shape.num_layers - 1)
    if last >= shape.num_layers:
        raise ConfigError(
            f"adapter.layers is [{first}, {last}], and the base has {shape.num_layers} layers",
            fix=f"layers count from 0; the last is {shape.num_layers - 1}",
        )
    if selection is not None:
        refuse_bad_selection(selection, shape, config, "the selection")
    if ranks is not None:
        ranks = {layer: ranks[layer] for layer in range(first, last + 1)}
    sites: list[Site] = []
    for layer in range(first, last + 1):
        if config.attention.rank:
            sites += [_attention_site(shape, config, layer, target) for target in config.attention.targets]
        if config.router.mode != "frozen":
            sites.append(_router_site(shape, config, layer))
        if config.experts.rank:
            if ranks is not None:
                sites.append(_site_of_ranks(shape, config, layer, ranks))
            else:
                sites.append(_expert_site(shape, config, layer, None if selection is None else selection[layer]))
    return sites


def refuse_bad_selection(selection: Selection, shape: ModelShape, config: AdapterConfig, where: str) -> None:
    """Raise ConfigError if a layer to be adapted has no expert, or an expert does not exist."""
    first, last = config.layers or (0, shape.num_layers - 1)
    for layer in range(first, min(last, shape.num_layers - 1) + 1):
        experts = selection.get(layer, ())
        if not experts:
            raise ConfigError(
                f"adapter.experts.select: {where} leaves layer {layer} without an expert",
                fix="give every adapted layer one, or leave the layer out with adapter.layers",
            )
        if list(experts) != sorted(set(experts)) or not 0 <= experts[0] <= experts[-1] < shape.num_experts:
            raise ConfigError(
                f"adapter.experts.select: {where} names experts {list(experts)[:8]} in layer {layer}",
                why=f"each once, in ascending order, from 0 to {shape.num_experts - 1}",
            )


def describe_sites(sites: list[Site], shape: ModelShape) -> str:
    """Counts by kind as text, so that "the experts were never trained" cannot go unnoticed."""
    lines = []
    for kind in ("attention", "router", "experts"):
        here = [site for site in sites if site.kind == kind]
        if not here:
            lines.append(f"  {kind:<10} " + ("frozen" if kind == "router" else "none"))
            continue
        total = sum(site.num_parameters for site in here)
        layers = "" if len({site.layer for site in here}) == shape.num_layers else _layer_range(here)
        how = "weight and bias" if here[0].whole else _strength(here)
        lines.append(f"  {kind:<10} {len(here)} {_each(here, shape)}{layers}, {how}: {total:,} parameters")
    return "\n".join(lines)


def _each(sites: list[Site], shape: ModelShape) -> str:
    """What a number of sites of one kind is a number of."""
    if sites[0].kind != "experts":
        return "projections" if sites[0].kind == "attention" else "routers"
    counts = sorted({shape.num_experts if site.experts is None else len(site.experts) for site in sites})
    experts = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts != [shape.num_experts]:
        experts += f" of {shape.num_experts}"
    shared = "" if sites[0].share == "none" else f", one {sites[0].share.upper()} for all of a layer's"
    return f"layers x {experts} experts x 2 projections{shared}"


def _strength(sites: list[Site]) -> str:
    ranks = [rank for site in sites for rank in site.ranks or ()]
    if not ranks:
        return f"rank {sites[0].rank}, scale {sites[0].scale:g}"
    scales = [scale for site in sites for scale in site.scales]
    return (
        f"rank {min(ranks)} to {max(ranks)} by use ({sum(ranks):,} ranks together), "
        f"scale {max(scales):.3g} to {min(scales):.3g}"
    )


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


def _router_site(shape: ModelShape, config: AdapterConfig, layer: int) -> Site:
    module, router = f"model.layers.{layer}.mlp.router", config.router
    if router.mode == "full":
        # The change of a weight [E, D] is the product of the unit matrix and itself: a LoRA of rank E.
        rank = shape.num_experts
        scale = lora_scale(rank, rank, rslora=config.rslora)
        return Site("router", layer, module, rank, rank, scale, rank * (shape.hidden + 1), whole=True)
    scale = lora_scale(router.alpha, router.rank, rslora=config.rslora)
    parameters = router.rank * (shape.hidden + shape.num_experts)
    return Site("router", layer, module, router.rank, router.alpha, scale, parameters)


def _expert_site(shape: ModelShape, config: AdapterConfig, layer: int, chosen: tuple[int, ...] | None) -> Site:
    rank, share = config.experts.rank, config.experts.share
    count = shape.num_experts if chosen is None else len(chosen)
    # gate_up reads D and writes 2F, down reads F and writes D.
    a, b = rank * (shape.hidden + shape.expert_width), rank * (2 * shape.expert_width + shape.hidden)
    parameters = a * (1 if share == "a" else count) + b * (1 if share == "b" else count)
    module = f"model.layers.{layer}.mlp.experts"
    alpha = config.experts.alpha
    scale = lora_scale(alpha, rank, rslora=config.rslora)
    return Site("experts", layer, module, rank, alpha, scale, parameters, chosen, share)


def _site_of_ranks(shape: ModelShape, config: AdapterConfig, layer: int, ranks: ExpertRanks) -> Site:
    """An experts' site whose file has the highest rank of all layers, so that one number stands for all of them."""
    highest = max(rank for of_layer in ranks.values() for rank in of_layer.values())
    here = {expert: rank for expert, rank in ranks[layer].items() if rank}
    plain = _expert_site(shape, config, layer, tuple(here))
    parameters = sum(here.values()) * (2 * shape.hidden + 3 * shape.expert_width)
    scales = tuple(lora_scale(config.experts.alpha, rank, rslora=config.rslora) for rank in here.values())
    scale = lora_scale(config.experts.alpha, highest, rslora=config.rslora)
    return replace(
        plain, rank=highest, scale=scale, num_parameters=parameters, ranks=tuple(here.values()), scales=scales
    )
