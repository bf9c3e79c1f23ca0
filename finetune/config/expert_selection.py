"""Selection and ranks of experts: the forms of `select` and `rank_by`, their rules, and the file of expert scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from finetune.config.lint import Problem
from finetune.config.schema import ExpertAdapterConfig, RunConfig
from finetune.config.suggest import suggest_word
from finetune.errors import ConfigError, InputError
from finetune.files import read_json, write_text
from finetune.records import parse_record

SELECT: tuple[str, ...] = ("adapter", "experts", "select")
RANK_BY: tuple[str, ...] = ("adapter", "experts", "rank_by")
HIGHEST_OVER_MEAN = 4  # adapter.experts.max_rank over adapter.experts.rank where the recipe leaves it open
_RANK_KINDS: tuple[Literal["uniform", "gate", "tokens"], ...] = ("uniform", "gate", "tokens")
_RANK_FORMS = "uniform, gate, tokens, or a file that `finetune experts score` wrote"
_FORMS = "all, top_p=0.2, top_k=8, or a file that `finetune experts score` wrote"


@dataclass(frozen=True)
class SelectRule:
    """A value of `adapter.experts.select`.

    Attributes:
        kind: all experts, the most used by share or by number, or a file that names them.
        top_p: share of the use that the selected experts have together, for `top_p`.
        top_k: experts per layer, for `top_k`.
        path: for `file`.
    """

    kind: Literal["all", "top_p", "top_k", "file"]
    top_p: float = 0.0
    top_k: int = 0
    path: str = ""


def parse_select(text: str) -> SelectRule:
    """Read `adapter.experts.select`.

    Raises:
        ValueError: it is none of the forms, or its number is out of range; the message continues "is ... ".
    """
    if text == "all":
        return SelectRule("all")
    name, equals, number = text.partition("=")
    if equals and name.strip() in ("top_p", "top_k"):
        return _top(name.strip(), number)
    close = suggest_word(name, ("all", "top_p", "top_k"))
    if close and not text.endswith(".json"):
        raise ValueError(f"must be {_FORMS}; {close}")
    if not text.strip() or equals:
        raise ValueError(f"must be {_FORMS}")
    return SelectRule("file", path=text)


@dataclass(frozen=True)
class RankRule:
    """A value of `adapter.experts.rank_by`.

    Attributes:
        kind: one rank for all, ranks by a score of the experts, or ranks by the score in a file.
        path: for `file`.
    """

    kind: Literal["uniform", "gate", "tokens", "file"]
    path: str = ""


def parse_rank_by(text: str) -> RankRule:
    """Read `adapter.experts.rank_by`.

    Raises:
        ValueError: it is none of the forms; the message continues "is ... ".
    """
    for kind in _RANK_KINDS:
        if text == kind:
            return RankRule(kind)
    close = suggest_word(text, _RANK_KINDS)
    if not text.strip() or (close and not text.endswith(".json")):
        raise ValueError(f"must be {_RANK_FORMS}" + (f"; {close}" if close else ""))
    return RankRule("file", path=text)


def highest_rank(experts: ExpertAdapterConfig) -> int:
    """Give the highest possible rank of an expert: the recipe's rank, or `max_rank` where ranks follow use."""
    if experts.rank_by == "uniform":
        return experts.rank
    return HIGHEST_OVER_MEAN * experts.rank if experts.max_rank is None else experts.max_rank


def _top(name: str, number: str) -> SelectRule:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if name == "top_p":
        if not 0 < value <= 1:
            raise ValueError("must be top_p=SHARE with a share above 0 and at most 1, such as top_p=0.2")
        return SelectRule("top_p", top_p=value)
    if not (value >= 1 and value == int(value)):
        raise ValueError("must be top_k=COUNT with a whole number of experts from 1, such as top_k=8")
    return SelectRule("top_k", top_k=int(value))


def require_file(path: Path, key: str = "select") -> None:
    """Raise ConfigError if a file of `adapter.experts.select` (or `.rank_by`) does not exist, naming the nearest."""
    if not path.is_file():
        near = suggest_word(path.name, sorted(other.name for other in path.parent.glob("*.json")))
        raise ConfigError(
            f"adapter.experts.{key}: there is no file {path}",
            fix=near
            or f"write {'all, top_p=0.2, top_k=8' if key == 'select' else 'uniform, gate, tokens'}, or make one: "
            "finetune experts score RECIPE --out FILE",
        )


def expert_problems(config: RunConfig) -> Iterator[Problem]:
    """Find settings of experts and routers that contradict each other or would have no effect."""
    experts, router, trainer = config.adapter.experts, config.adapter.router, config.trainer
    try:
        parse_select(experts.select)
    except ValueError as error:
        yield Problem(SELECT, f"is {experts.select!r}, {error}")
    if experts.rank == 0:
        for key, off in (("select", "all"), ("share", "none"), ("rank_by", "uniform")):
            if getattr(experts, key) != off:
                yield Problem(("adapter", "experts", key), "is set, but adapter.experts.rank is 0")
    yield from _rank_problems(experts)
    if router.mode == "lora" and router.rank < 1:
        yield Problem(
            ("adapter", "router", "rank"),
            f"is {router.rank}, must be at least 1",
            "to leave routers frozen write mode=frozen",
        )
    if not trainer.router_balance_coefficient:
        for key, off in (("router_balance_scope", "microbatch"), ("router_balance_target", "uniform")):
            if getattr(trainer, key) != off:
                yield Problem(("trainer", key), "is set, but trainer.router_balance_coefficient is 0")
    if config.evaluate.max_routing_drift is not None and not config.evaluate.routing_examples:
        yield Problem(("evaluate", "max_routing_drift"), "is set, but evaluate.routing_examples is 0")


def _rank_problems(experts: ExpertAdapterConfig) -> Iterator[Problem]:
    try:
        uniform = parse_rank_by(experts.rank_by).kind == "uniform"
    except ValueError as error:
        yield Problem(RANK_BY, f"is {experts.rank_by!r}, {error}")
        return
    limit: tuple[str, ...] = ("adapter", "experts", "max_rank")
    if uniform and experts.max_rank is not None:
        yield Problem(limit, "is set, but adapter.experts.rank_by is uniform: every expert has adapter.experts.rank")
    if not uniform and experts.max_rank is not None and experts.max_rank < experts.rank:
        yield Problem(
            limit,
            f"is {experts.max_rank}, below adapter.experts.rank ({experts.rank}), which is the mean: the ranks of a "
            "layer could not add up",
            "raise it, or lower rank",
        )
    if not uniform and experts.share != "none":
        yield Problem(
            RANK_BY,
            f"is set, but adapter.experts.share is {experts.share}: a factor that experts share has one rank",
            "share: none, or rank_by: uniform",
        )


Score = Literal["gate", "tokens"]
SCORES: tuple[Score, ...] = get_args(Score)
FORMAT = 1
_FIX = "write it again with `finetune experts score`"


@dataclass(frozen=True)
class ExpertScores:
    """Use of each expert by a data set, the experts selected for it, and their ranks: content of experts.json.

    Attributes:
        base_name, base_identity: the measured base.
        samples, tokens: number of examples and tokens measured.
        gate, tokens_share: share of the router weight and of the routed tokens, each [layers][E].
        by: the score that the selection used.
        select: the rule of the selection, such as `top_p=0.2`.
        selected: layer -> experts, in order.
        ranks: layer -> rank of each of these experts, 0 for none; None: not decided here, or one rank for all.
    """

    base_name: str
    base_identity: str
    samples: int
    tokens: int
    gate: list[list[float]]
    tokens_share: list[list[float]]
    by: Score
    select: str
    selected: dict[int, tuple[int, ...]]
    ranks: dict[int, tuple[int, ...]] | None = None

    def scores(self, by: Score) -> list[list[float]]:
        """Give one of the two scores, [layers][E]."""
        return self.gate if by == "gate" else self.tokens_share

    def describe(self) -> list[str]:
        """Describe each layer in a line: number of selected experts, their share of both scores, and their ranks."""
        lines = []
        for layer, experts in self.selected.items():
            gate, share = (sum(scores[layer][e] for e in experts) for scores in (self.gate, self.tokens_share))
            shown = " ".join(map(str, experts[:12])) + (" ..." if len(experts) > 12 else "")
            lines.append(
                f"layer {layer:>2}: {len(experts):>3} of {len(self.gate[layer])} experts, {gate:.1%} of the gate, "
                f"{share:.1%} of the routed tokens: {shown}{self._ranks_of(layer)}"
            )
        total = sum(map(len, self.selected.values()))
        num_experts = sum(map(len, self.gate))
        lines.append(f"{total} of {num_experts} experts by {self.by} with {self.select}, on {self.samples} examples")
        return lines

    def _ranks_of(self, layer: int) -> str:
        if self.ranks is None:
            return ""
        ranks = self.ranks[layer]
        with_one = [rank for rank in ranks if rank]
        left = f", {len(ranks) - len(with_one)} experts without" if len(with_one) < len(ranks) else ""
        return f"; ranks {min(with_one)} to {max(with_one)}, {sum(ranks)} in total{left}"


def write_expert_scores(path: Path, scores: ExpertScores) -> None:
    """Write the JSON file that `adapter.experts.select` and `.rank_by` take."""
    content = {"format": FORMAT} | asdict(scores)
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_expert_scores(path: Path, key: str = "select") -> ExpertScores:
    """Read a file that `write_expert_scores` wrote.

    Args:
        path: the file.
        key: the key of `adapter.experts` that names it, for messages.

    Raises:
        ConfigError: there is no such file.
        InputError: it is something else, or damaged.
    """
    require_file(path, key)
    try:
        content = read_json(path, "an experts.json", _FIX)
        if content.pop("format", None) != FORMAT:
            raise ValueError("another format")
        scores = parse_record(ExpertScores, content, str(path), fix=_FIX)
        _check(scores)
        return scores
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{path} is not a file that `finetune experts score` wrote", why=str(error), fix=_FIX
        ) from error


def _check(scores: ExpertScores) -> None:
    """Raise ValueError or TypeError if a score is no share, or ranks and selected experts do not match."""
    for table in (scores.gate, scores.tokens_share):
        if not all(0 <= value <= 1 for of_layer in table for value in of_layer):
            raise ValueError("a score is not between 0 and 1")
    if scores.by not in SCORES:
        raise ValueError(f"by is {scores.by!r}")
    if scores.ranks is None:
        return
    lengths = [{layer: len(of) for layer, of in table.items()} for table in (scores.ranks, scores.selected)]
    if lengths[0] != lengths[1] or any(rank < 0 for ranks in scores.ranks.values() for rank in ranks):
        raise ValueError("its ranks are not one for each selected expert")
