"""Which experts a data set uses, and the choice of those worth adapting (ESFT: Wang et al. 2024, arXiv:2407.01906).

Two scores for each expert of a layer, both means over samples of means over a sample's tokens, both adding up to 1
over a layer: the weight with which its router takes the expert (`gate`), and how often it does, as a share of all
choices (`tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune import log
from finetune.adapters.sites import given_ranks, ranks_of, refuse_bad_selection
from finetune.config.expert_selection import (
    ExpertScores,
    RankRule,
    Score,
    SelectRule,
    parse_rank_by,
    parse_select,
    read_expert_scores,
)
from finetune.config.schema import AdapterConfig, DataConfig
from finetune.data.harmony.render import Example
from finetune.errors import ConfigError, InputError
from finetune.evaluate.evalset import evenly_spread
from finetune.model.build import Base
from finetune.model.usage import count_usage

SCORED_SAMPLES = 128


def score_experts(
    base: Base, base_name: str, samples: Sequence[Example], data: DataConfig, select: str, by: Score, count: int
) -> ExpertScores:
    """Measure both scores with the model as it is, and choose.

    Args:
        base: without an adapter, or with it off.
        base_name: for the file.
        samples: training samples; up to `count` of them, evenly spread, are used.
        data: gives the length of a row.
        select: `all`, `top_p=...` or `top_k=...`.
        by: the score to choose by.
        count: samples at most.

    Raises:
        ConfigError: the rule asks for more experts than there are.
    """
    rule = parse_select(select)
    refuse_too_many(rule, base.checkpoint.arch.num_experts)
    used = evenly_spread(samples, count)
    counts = count_usage(
        base,
        used,
        data.max_length,
        lambda number: np.full(len(used[number].ids), number, dtype=np.int64),
        len(used),
        task="scoring experts",
    )
    per_sample = counts.tokens[:, None, None]
    gate = (counts.gates / per_sample).mean(0)
    share = (counts.chosen / per_sample).mean(0) / base.checkpoint.arch.num_active_experts
    scores = gate if by == "gate" else share
    selected = choose(scores, rule)
    return ExpertScores(
        base_name,
        base.identity,
        len(used),
        int(counts.tokens.sum()),
        gate.tolist(),
        share.tolist(),
        by,
        select,
        selected,
    )


def refuse_too_many(rule: SelectRule, num_experts: int) -> None:
    """Raise ConfigError if `top_k` asks for more experts than a layer has."""
    if rule.top_k > num_experts:
        raise ConfigError(
            f"adapter.experts.select asks for {rule.top_k} experts a layer, the base has {num_experts}",
            fix=f"write top_k={num_experts} or less, or `all`",
        )


def choose(scores: NDArray[np.float64], rule: SelectRule) -> dict[int, tuple[int, ...]]:
    """The experts of each layer with the highest scores; of equal ones the first.

    Args:
        scores: [layers, E], each layer's adding up to 1.
        rule: `all`; `top_k`: so many, at most E; `top_p`: the fewest that have that share together.
    """
    selected = {}
    for layer, row in enumerate(scores):
        if rule.kind == "all":
            selected[layer] = tuple(range(len(row)))
            continue
        order = np.argsort(-row, kind="stable")
        enough = np.cumsum(row[order]) >= rule.top_p * row.sum() - 1e-9
        count = rule.top_k or int(enough.argmax()) + 1
        selected[layer] = tuple(sorted(int(expert) for expert in order[:count]))
    return selected


def check_base(affinity: ExpertScores, base: Base, where: str, key: str = "select") -> None:
    """Raise ConfigError if scores were measured on another base, naming the key of `adapter.experts` they came from."""
    if affinity.base_identity != base.identity:
        raise ConfigError(
            f"adapter.experts.{key}: {where} was measured on another base",
            why=f"it belongs to {affinity.base_name} ({affinity.base_identity[:12]}), this is {base.identity[:12]}",
            fix="measure again: finetune experts score RECIPE --out FILE",
        )
    shape = base.checkpoint.arch
    for scores in (affinity.gate, affinity.tokens_share):
        if len(scores) != shape.num_layers or any(len(of_layer) != shape.num_experts for of_layer in scores):
            raise InputError(f"{where} does not have a score for each of the base's experts")


def check_selection(affinity: ExpertScores, base: Base, config: AdapterConfig, where: str) -> None:
    """Compare a choice with the base and the recipe it is to be used with.

    Raises:
        ConfigError: it was measured on another base, or leaves a layer without experts, or names one that is not there.
    """
    check_base(affinity, base, where)
    refuse_bad_selection(affinity.selected, base.checkpoint.arch, config, where)


def choose_experts(
    base: Base, base_name: str, samples: Sequence[Example], data: DataConfig, config: AdapterConfig
) -> ExpertScores | None:
    """What `adapter.experts.select` and `.rank_by` come to for a base and its training samples.

    Returns:
        None for all experts with one rank.

    Raises:
        ConfigError: see `check_selection`, and `finetune.adapters.sites.given_ranks`.
    """
    rule, ranking = parse_select(config.experts.select), parse_rank_by(config.experts.rank_by)
    given = None
    if ranking.kind == "file":
        given = read_expert_scores(Path(ranking.path).expanduser(), "rank_by")
        check_base(given, base, ranking.path, "rank_by")
    if rule.kind == "all" and ranking.kind == "uniform":
        return None
    if rule.kind == "file":
        affinity = read_expert_scores(Path(rule.path).expanduser())
        check_selection(affinity, base, config, rule.path)
    elif rule.kind == "all" and given is not None:
        every = tuple(range(base.checkpoint.arch.num_experts))
        affinity = replace(given, select="all", selected=dict.fromkeys(range(len(given.gate)), every), ranks=None)
    else:
        affinity = score_experts(base, base_name, samples, data, config.experts.select, "gate", SCORED_SAMPLES)
    affinity = replace(affinity, ranks=_ranks(affinity, given, config, ranking))
    log.info("experts to adapt:\n  " + "\n  ".join(affinity.describe()))
    return affinity


def _ranks(
    affinity: ExpertScores, given: ExpertScores | None, config: AdapterConfig, ranking: RankRule
) -> dict[int, tuple[int, ...]] | None:
    """Layer -> rank of each selected expert, of the layers that are adapted."""
    if ranking.kind == "uniform":
        return None
    if ranking.kind != "file":
        ranks = ranks_of(affinity, ranking.kind, affinity.selected, config.experts)
    elif given is not None and given.ranks is not None:
        ranks = given_ranks(given, affinity.selected, config.experts, ranking.path)
    else:
        assert given is not None
        ranks = ranks_of(given, given.by, affinity.selected, config.experts)
    return {layer: tuple(of_layer.values()) for layer, of_layer in ranks.items()}
