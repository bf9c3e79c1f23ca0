"""Ranks of experts that follow their use under a budget: as many parameters as with one rank, dealt out anew."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from finetune.adapters.sites import ExpertRanks, Selection
from finetune.config.affinity import Affinity, Score
from finetune.config.expert_rules import highest_rank
from finetune.config.schema import ExpertAdapterConfig
from finetune.errors import ConfigError


def ranks_by_use(use: Sequence[float], total: int, highest: int) -> list[int]:
    """Deal out ranks in proportion to use, none above the highest, with exactly this sum.

    By largest remainder, in exact fractions: the same numbers on every machine. Of equal remainders the more used
    expert comes first, then the one named first. What the highest rank leaves over goes to the others in proportion,
    and where none of these is used, evenly.

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


def ranks_of(affinity: Affinity, by: Score, selected: Selection, config: ExpertAdapterConfig) -> ExpertRanks:
    """Layer -> rank of each selected expert: `rank` times their number together, by one of the scores.

    Args:
        affinity: what was measured.
        by: the score.
        selected: layer -> experts.
        config: gives mean and highest rank.
    """
    scores, ranks = affinity.scores(by), {}
    for layer, experts in selected.items():
        use = [scores[layer][expert] for expert in experts]
        dealt = ranks_by_use(use, config.rank * len(experts), highest_rank(config))
        ranks[layer] = dict(zip(experts, dealt, strict=True))
    return ranks


def ranks_by_expert(affinity: Affinity) -> ExpertRanks | None:
    """The ranks that were decided on; None: one for all."""
    if affinity.ranks is None:
        return None
    return {layer: dict(zip(affinity.selected[layer], ranks, strict=True)) for layer, ranks in affinity.ranks.items()}


def given_ranks(affinity: Affinity, selected: Selection, config: ExpertAdapterConfig, where: str) -> ExpertRanks:
    """The ranks that a run's experts.json has, if they are what this recipe's budget gives.

    Raises:
        ConfigError: they add up to something else, go above the highest, or are of other experts.
    """
    found = ranks_by_expert(affinity) or {}
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
                fix="give select, rank and max_rank of that run, or a file of `finetune experts score`, dealt out anew",
            )
    return {layer: found[layer] for layer in selected}
