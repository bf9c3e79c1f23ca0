"""Scores of experts on a data set, and the choice of those to adapt (ESFT: Wang et al. 2024, arXiv:2407.01906).

An expert has two scores, both means over examples of means over an example's tokens, both adding up to 1 over a layer:
the router's weight of the expert (`gate`), and its share of the router's choices (`tokens`).
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

SCORED_EXAMPLES = 128


def score_experts(
    base: Base, base_name: str, examples: Sequence[Example], data: DataConfig, select: str, by: Score, count: int
) -> ExpertScores:
    """Measure both scores with the model as it is, and choose experts.

    Args:
        base: without an adapter, or with it off.
        base_name: recorded in the file.
        examples: of the training split; up to `count` of them, evenly spread, are used.
        data: gives the length of a packed sequence.
        select: `all`, `top_p=...` or `top_k=...`.
        by: the score to choose by.
        count: maximum number of examples.

    Raises:
        ConfigError: the rule asks for more experts than there are.
    """
    rule = parse_select(select)
    refuse_too_many(rule, base.checkpoint.arch.num_experts)
    used = evenly_spread(examples, count)
    counts = count_usage(
        base,
        used,
        data.max_length,
        lambda number: np.full(len(used[number].ids), number, dtype=np.int64),
        len(used),
        task="scoring experts",
    )
    per_example = counts.tokens[:, None, None]
    gate = (counts.gates / per_example).mean(0)
    share = (counts.chosen / per_example).mean(0) / base.checkpoint.arch.num_active_experts
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
            f"adapter.experts.select asks for {rule.top_k} experts per layer, the base has {num_experts}",
            fix=f"write top_k={num_experts} or less, or `all`",
        )


def choose(scores: NDArray[np.float64], rule: SelectRule) -> dict[int, tuple[int, ...]]:
    """The experts of each layer with the highest scores; of equal ones the first.

    Args:
        scores: [layers, E], adding up to 1 in each layer.
        rule: `all`; `top_k`: that many, at most E; `top_p`: the fewest that together have that share.
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


def check_base(scores: ExpertScores, base: Base, where: str, key: str = "select") -> None:
    """Raise ConfigError if scores were measured on another base, naming the key of `adapter.experts` they came from."""
    if scores.base_identity != base.identity:
        raise ConfigError(
            f"adapter.experts.{key}: {where} was measured on another base",
            why=f"it belongs to {scores.base_name} ({scores.base_identity[:12]}), this is {base.identity[:12]}",
            fix="measure again: finetune experts score RECIPE --out FILE",
        )
    arch = base.checkpoint.arch
    for by_layer in (scores.gate, scores.tokens_share):
        if len(by_layer) != arch.num_layers or any(len(of_layer) != arch.num_experts for of_layer in by_layer):
            raise InputError(f"{where} does not have a score for each of the base's experts")


def check_selection(scores: ExpertScores, base: Base, config: AdapterConfig, where: str) -> None:
    """Check a choice of experts against the base and the recipe.

    Raises:
        ConfigError: it was measured on another base, leaves a layer without experts, or names one that does not exist.
    """
    check_base(scores, base, where)
    refuse_bad_selection(scores.selected, base.checkpoint.arch, config, where)


def choose_experts(
    base: Base, base_name: str, examples: Sequence[Example], data: DataConfig, config: AdapterConfig
) -> ExpertScores | None:
    """Apply `adapter.experts.select` and `.rank_by` to a base and its training examples.

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
        scores = read_expert_scores(Path(rule.path).expanduser())
        check_selection(scores, base, config, rule.path)
    elif rule.kind == "all" and given is not None:
        every = tuple(range(base.checkpoint.arch.num_experts))
        scores = replace(given, select="all", selected=dict.fromkeys(range(len(given.gate)), every), ranks=None)
    else:
        scores = score_experts(base, base_name, examples, data, config.experts.select, "gate", SCORED_EXAMPLES)
    scores = replace(scores, ranks=_ranks(scores, given, config, ranking))
    log.info("experts to adapt:\n  " + "\n  ".join(scores.describe()))
    return scores


def _ranks(
    scores: ExpertScores, given: ExpertScores | None, config: AdapterConfig, ranking: RankRule
) -> dict[int, tuple[int, ...]] | None:
    """Layer -> rank of each selected expert, for the adapted layers."""
    if ranking.kind == "uniform":
        return None
    if ranking.kind != "file":
        ranks = ranks_of(scores, ranking.kind, scores.selected, config.experts)
    elif given is not None and given.ranks is not None:
        ranks = given_ranks(given, scores.selected, config.experts, ranking.path)
    else:
        assert given is not None
        ranks = ranks_of(given, given.by, scores.selected, config.experts)
    return {layer: tuple(of_layer.values()) for layer, of_layer in ranks.items()}
