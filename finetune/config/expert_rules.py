"""Rules about experts and routers: what may be selected, shared and trained of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.config.keys import suggest_word
from finetune.config.problems import Problem
from finetune.config.schema import RunConfig
from finetune.errors import ConfigError

SELECT: tuple[str, ...] = ("adapter", "experts", "select")
_FORMS = "all, top_p=0.2, top_k=8, or a file that `finetune experts score` wrote"


@dataclass(frozen=True)
class SelectRule:
    """What `adapter.experts.select` says.

    Attributes:
        kind: all experts, the most used by share or by number, or a file that names them.
        top_p: share of the use that the chosen experts have together, for `top_p`.
        top_k: experts a layer, for `top_k`.
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


def refuse_missing(path: Path) -> None:
    """Raise ConfigError if a file of `adapter.experts.select` does not exist, naming the nearest that does."""
    if not path.is_file():
        near = suggest_word(path.name, sorted(other.name for other in path.parent.glob("*.json")))
        raise ConfigError(
            f"adapter.experts.select: there is no file {path}",
            fix=near or "write all, top_p=0.2, top_k=8, or make one: finetune experts score RECIPE --out FILE",
        )


def expert_problems(config: RunConfig) -> Iterator[Problem]:
    """Find settings of experts and routers that contradict each other or would do nothing."""
    experts, router, trainer = config.adapter.experts, config.adapter.router, config.trainer
    try:
        parse_select(experts.select)
    except ValueError as error:
        yield Problem(SELECT, f"is {experts.select!r}, {error}")
    if experts.rank == 0:
        for key, off in (("select", "all"), ("share", "none")):
            if getattr(experts, key) != off:
                yield Problem(("adapter", "experts", key), "is set, but adapter.experts.rank is 0")
    if router.mode == "lora" and router.rank < 1:
        yield Problem(
            ("adapter", "router", "rank"),
            f"is {router.rank}, must be at least 1",
            "to leave them alone: mode=frozen",
        )
    if not trainer.router_balance_coefficient:
        for key, off in (("router_balance_scope", "microbatch"), ("router_balance_target", "uniform")):
            if getattr(trainer, key) != off:
                yield Problem(("trainer", key), "is set, but trainer.router_balance_coefficient is 0")
    if config.evaluate.max_routing_drift is not None and not config.evaluate.routing_samples:
        yield Problem(("evaluate", "max_routing_drift"), "is set, but evaluate.routing_samples is 0")
