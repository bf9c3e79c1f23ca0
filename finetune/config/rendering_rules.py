"""Rules on how conversations become tokens: settings that contradict each other, weights that train nothing."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.problems import Problem
from finetune.config.schema import DataConfig


def rendering_problems(data: DataConfig) -> Iterator[Problem]:
    """Yield what is wrong with `data.loss`, `convention`, `tool_call_type`, `earlier_thinking` and `model_identity`."""
    loss = data.loss
    if not any((loss.analysis, loss.commentary, loss.tool_call, loss.final)):
        yield Problem(("data", "loss"), "trains nothing: every weight is 0", "give one of them a weight")
    if data.earlier_thinking == "split" and loss.turns == "last":
        yield Problem(
            ("data", "loss", "turns"),
            "is last, but data.earlier_thinking=split makes a sample of every turn",
            "leave data.loss.turns out, or write data.earlier_thinking=drop",
        )
    if data.convention == "template":
        if data.earlier_thinking == "keep":
            yield Problem(
                ("data", "earlier_thinking"),
                "is keep, but the template drops earlier thinking whatever it is told",
                "write data.earlier_thinking=split to train all of it, or data.convention=harmony",
            )
        if data.tool_call_type == "constrain":
            yield Problem(
                ("data", "tool_call_type"),
                "is constrain, but the template writes json",
                "leave data.tool_call_type out, or write data.convention=harmony",
            )
    if data.model_identity is not None and not data.model_identity.strip():
        yield Problem(("data", "model_identity"), "is empty", "leave it out for the published one")
