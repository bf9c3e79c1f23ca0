"""The sites of an adapter, planned from the base's sizes and the recipe before any weight is loaded; ranks by use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from finetune.arch import Arch, attention_path, experts_path, router_path
from finetune.config.derive import lora_scale
from finetune.config.expert_selection import ExpertScores, Score, highest_rank
from finetune.config.schema import AdapterConfig, ExpertAdapterConfig
from finetune.errors import ConfigError

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
        layer: from 0.
        module: path in the model, such as `model.layers.0.self_attn.q_proj`.
        rank, alpha: of the update. Where experts' ranks differ, the highest of all layers, as files have it.
        scale: what b @ a is multiplied by: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        num_parameters: trained parameters.
        experts: the adapted ones of an experts' site; None: all of them.
        share: the factor that all experts of the layer share.
        ranks, scales: of each adapted expert where they differ; None and empty: `rank` and `scale`.
        whole: a router whose weight and bias are trained in full, not as factors; `rank` is that of its export.
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

    @property
    def name(self) -> str:
        """Last part of the module's path: `q_proj`, `router` or `experts`."""
        return self.module.rpartition(".")[2]

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the adapted weights: `name`, or the experts' two projections."""
        return ("gate_up_proj", "down_proj") if self.kind == "experts" else (self.name,)


def plan_sites(
    arch: Arch, config: AdapterConfig, selection: Selection | None = None, ranks: ExpertRanks | None = None
) -> list[Site]:
    """All sites of a recipe, layer by layer.

    Args:
        arch: sizes of the base.
        config: the recipe's adapter part.
        selection: the adapted experts of each layer. None: all.
        ranks: of these experts, where `adapter.experts.rank_by` makes them differ. None: the recipe's rank for each.

    Raises:
        ConfigError: the recipe's layers are not the model's, or the selection leaves one without an expert.
    """
    first, last = config.layers or (0, arch.num_layers - 1)
    if last >= arch.num_layers:
        raise ConfigError(
            f"adapter.layers is [{first}, {last}], and the base has {arch.num_layers} layers",
            fix=f"layers count from 0; the last is {arch.num_layers - 1}",
        )
    if selection is not None:
        refuse_bad_selection(selection, arch, config, "the selection")
    if ranks is not None:
        ranks = {layer: ranks[layer] for layer in range(first, last + 1)}
    sites: list[Site] = []
    for layer in range(first, last + 1):
        if config.attention.rank:
            sites += [_attention_site(arch, config, layer, target) for target in config.attention.targets]
        if config.router.mode != "frozen":
            sites.append(_router_site(arch, config, layer))
        if config.experts.rank:
            if ranks is not None:
                sites.append(_site_of_ranks(arch, config, layer, ranks))
            else:
                sites.append(_expert_site(arch, config, layer, None if selection is None else selection[layer]))
    return sites


def refuse_bad_selection(selection: Selection, arch: Arch, config: AdapterConfig, where: str) -> None:
    """Raise ConfigError if a layer to be adapted has no expert, or an expert does not exist."""
    first, last = config.layers or (0, arch.num_layers - 1)
    for layer in range(first, min(last, arch.num_layers - 1) + 1):
        experts = selection.get(layer, ())
        if not experts:
            raise ConfigError(
                f"adapter.experts.select: {where} leaves layer {layer} without an expert",
                fix="give every adapted layer one, or leave the layer out with adapter.layers",
            )
        if list(experts) != sorted(set(experts)) or not 0 <= experts[0] <= experts[-1] < arch.num_experts:
            raise ConfigError(
                f"adapter.experts.select: {where} names experts {list(experts)[:8]} in layer {layer}",
                why=f"each once, in ascending order, from 0 to {arch.num_experts - 1}",
            )


def describe_sites(sites: list[Site], arch: Arch) -> str:
    """Counts by kind as text, so that experts left untrained cannot go unnoticed."""
    lines = []
    for kind in ("attention", "router", "experts"):
        here = [site for site in sites if site.kind == kind]
        if not here:
            lines.append(f"  {kind:<10} " + ("frozen" if kind == "router" else "none"))
            continue
        total = sum(site.num_parameters for site in here)
        layers = "" if len({site.layer for site in here}) == arch.num_layers else _layer_range(here)
        how = "weight and bias" if here[0].whole else _strength(here)
        lines.append(f"  {kind:<10} {len(here)} {_each(here, arch)}{layers}, {how}: {total:,} parameters")
    return "\n".join(lines)


def _each(sites: list[Site], arch: Arch) -> str:
    """The unit that a number of sites of one kind counts."""
    if sites[0].kind != "experts":
        return "projections" if sites[0].kind == "attention" else "routers"
    counts = sorted({arch.num_experts if site.experts is None else len(site.experts) for site in sites})
    experts = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts != [arch.num_experts]:
        experts += f" of {arch.num_experts}"
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


def _attention_site(arch: Arch, config: AdapterConfig, layer: int, target: str) -> Site:
    inputs, out = {
        "q_proj": (arch.hidden, arch.query_size),
        "k_proj": (arch.hidden, arch.kv_size),
        "v_proj": (arch.hidden, arch.kv_size),
        "o_proj": (arch.query_size, arch.hidden),
    }[target]
    rank = config.attention.rank
    module = attention_path(layer, target)
    alpha = config.attention.alpha
    scale = lora_scale(alpha, rank, rslora=config.rslora)
    return Site("attention", layer, module, rank, alpha, scale, rank * (inputs + out))


def _router_site(arch: Arch, config: AdapterConfig, layer: int) -> Site:
    module, router = router_path(layer), config.router
    if router.mode == "full":
        # The change of a weight [E, D] is the product of the unit matrix and itself: a LoRA of rank E.
        rank = arch.num_experts
        scale = lora_scale(rank, rank, rslora=config.rslora)
        return Site("router", layer, module, rank, rank, scale, rank * (arch.hidden + 1), whole=True)
    scale = lora_scale(router.alpha, router.rank, rslora=config.rslora)
    parameters = router.rank * (arch.hidden + arch.num_experts)
    return Site("router", layer, module, router.rank, router.alpha, scale, parameters)


def _expert_site(arch: Arch, config: AdapterConfig, layer: int, chosen: tuple[int, ...] | None) -> Site:
    rank, share = config.experts.rank, config.experts.share
    count = arch.num_experts if chosen is None else len(chosen)
    # gate_up reads D and writes 2F, down reads F and writes D.
    a, b = rank * (arch.hidden + arch.expert_width), rank * (2 * arch.expert_width + arch.hidden)
    parameters = a * (1 if share == "a" else count) + b * (1 if share == "b" else count)
    module = experts_path(layer)
    alpha = config.experts.alpha
    scale = lora_scale(alpha, rank, rslora=config.rslora)
    return Site("experts", layer, module, rank, alpha, scale, parameters, chosen, share)


def _site_of_ranks(arch: Arch, config: AdapterConfig, layer: int, ranks: ExpertRanks) -> Site:
    """An experts' site of several ranks; files give every expert the highest rank of all layers."""
    highest = max(rank for of_layer in ranks.values() for rank in of_layer.values())
    here = {expert: rank for expert, rank in ranks[layer].items() if rank}
    plain = _expert_site(arch, config, layer, tuple(here))
    parameters = sum(here.values()) * (2 * arch.hidden + 3 * arch.expert_width)
    scales = tuple(lora_scale(config.experts.alpha, rank, rslora=config.rslora) for rank in here.values())
    scale = lora_scale(config.experts.alpha, highest, rslora=config.rslora)
    return replace(
        plain, rank=highest, scale=scale, num_parameters=parameters, ranks=tuple(here.values()), scales=scales
    )


# ---- ranks of experts in proportion to their use, with as many parameters as one rank for all


def ranks_by_use(use: Sequence[float], total: int, highest: int) -> list[int]:
    """Distribute ranks in proportion to use, none above the highest, with exactly this sum.

    By largest remainder, in exact fractions: the same numbers on every machine. Of equal remainders the more used
    expert comes first, then the one with the lower index. What the highest rank leaves over goes to the others in
    proportion, and evenly where none of these is used.

    Args:
        use: of each expert, 0 or more.
        total: sum of the ranks, at most `highest` times the number of experts.
        highest: of one expert.

    >>> ranks_by_use([0.5, 0.3, 0.2, 0.0], 8, 16)
    [4, 2, 2, 0]
    >>> ranks_by_use([0.5, 0.3, 0.2, 0.0], 8, 3)
    [3, 3, 2, 0]
    """
    if not 0 <= total <= highest * len(use):
        raise ValueError(f"{total} ranks do not go into {len(use)} experts of at most {highest}")
    ranks = [0] * len(use)
    free, left = list(range(len(use))), total
    while True:
        sum_of_use = sum((Fraction(use[i]) for i in free), Fraction())
        quota = {i: left * (Fraction(use[i]) / sum_of_use if sum_of_use else Fraction(1, len(free))) for i in free}
        full = [i for i in free if quota[i] >= highest]
        if not full:
            break
        for i in full:
            ranks[i] = highest
        left -= highest * len(full)
        free = [i for i in free if i not in full]
    for i in free:
        ranks[i] = int(quota[i])
    by_remainder = sorted(free, key=lambda i: (ranks[i] - quota[i], -use[i], i))
    for i in by_remainder[: left - sum(ranks[i] for i in free)]:
        ranks[i] += 1
    return ranks


def ranks_of(scores: ExpertScores, by: Score, selected: Selection, config: ExpertAdapterConfig) -> ExpertRanks:
    """Layer -> rank of each selected expert: `rank` times their number together, by one of the scores.

    Args:
        scores: measured.
        by: the score to use.
        selected: layer -> experts.
        config: gives mean and highest rank.
    """
    by_layer, ranks = scores.scores(by), {}
    for layer, experts in selected.items():
        use = [by_layer[layer][expert] for expert in experts]
        distributed = ranks_by_use(use, config.rank * len(experts), highest_rank(config))
        ranks[layer] = dict(zip(experts, distributed, strict=True))
    return ranks


def ranks_by_expert(scores: ExpertScores) -> ExpertRanks | None:
    """The ranks in a run's experts.json; None: one rank for all."""
    if scores.ranks is None:
        return None
    return {layer: dict(zip(scores.selected[layer], ranks, strict=True)) for layer, ranks in scores.ranks.items()}


def given_ranks(scores: ExpertScores, selected: Selection, config: ExpertAdapterConfig, where: str) -> ExpertRanks:
    """The ranks in a run's experts.json, checked against this recipe's budget.

    Raises:
        ConfigError: they add up to something else, go above the highest, or are of other experts.
    """
    found = ranks_by_expert(scores) or {}
    for layer, experts in selected.items():
        here, budget, highest = found.get(layer, {}), config.rank * len(experts), highest_rank(config)
        problem = None
        if tuple(here) != tuple(experts):
            problem = f"has ranks of other experts in layer {layer} than adapter.experts.select gives"
        elif sum(here.values()) != budget:
            problem = (
                f"has {sum(here.values())} ranks in layer {layer}, adapter.experts.rank={config.rank} for "
                f"{len(experts)} experts makes {budget}"
            )
        elif max(here.values()) > highest:
            problem = f"has rank {max(here.values())} in layer {layer}, the highest here is {highest}"
        if problem:
            raise ConfigError(
                f"adapter.experts.rank_by: {where} {problem}",
                why="ranks that a run decided on are taken as they are",
                fix="give select, rank and max_rank of that run, or a file of `finetune experts score`",
            )
    return {layer: found[layer] for layer in selected}
