"""Base against base + adapter on the same rows: losses, label scores and generated answers, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from finetune.console import Progress
from finetune.data.render import render_prompt
from finetune.errors import CheckError
from finetune.evaluate.generation import Sampling, generate, read_completion
from finetune.evaluate.labels import score_labels
from finetune.evaluate.likelihood import held_out_loss
from finetune.evaluate.opening import OpenedModel
from finetune.evaluate.row_log import RowLog
from finetune.evaluate.testset import Suite, TestSet

WHO = ("base", "adapter")
ROWS_AT_ONCE = 128
PROMPTS_AT_ONCE = 8


def measure(
    opened: OpenedModel, suites: Sequence[Suite], log: RowLog, *, num_generated: int, sampling: Sampling
) -> None:
    """Fill a row log with what is missing in it.

    Args:
        opened: base and adapter.
        suites: what to score; the first one's prompts are answered too.
        log: rows measured already are not measured again.
        num_generated: how many rows of the first suite are answered.
        sampling: how.

    Raises:
        CheckError: a loss is not finite.
        InputError: a row's answer is not among its suite's labels.
    """
    for who in WHO:
        with nullcontext() if who == "adapter" else opened.adapter.disabled():
            for suite in suites:
                _score(opened, suite, who, log)
            if suites and num_generated:
                _answer(opened, suites[0], who, log, num_generated, sampling)


def _score(opened: OpenedModel, suite: Suite, who: str, log: RowLog) -> None:
    model, rows = opened.base.model, suite.rows
    for chunk in _chunks(log.missing("score", who, suite.name, range(len(rows.samples))), ROWS_AT_ONCE):
        samples = [rows.samples[n] for n in chunk]
        row_tokens = max(suite.data.max_length, *(len(sample.ids) for sample in samples))
        loss = held_out_loss(model, samples, row_tokens, task=f"{suite.name} loss, {who}")
        if not all(math.isfinite(value) for value in loss.nll):
            raise CheckError(
                f"{suite.name}: a loss of {who} is not finite",
                why="the model's numbers left the range of its dtype",
                fix="check the base, the adapter and the rows",
            )
        labels: Sequence[list[float] | None] = [None] * len(chunk)
        shared: Sequence[float | None] = [None] * len(chunk)
        if rows.labels is not None:
            records = [rows.records[n] for n in chunk]
            scores = score_labels(model, records, rows.labels, suite.data, task=f"{suite.name} labels, {who}")
            labels = scores.log_likelihood.tolist()
            shared = [None] * len(chunk) if scores.shared is None else scores.shared.tolist()
        log.append(
            {
                "measured": "score", "who": who, "suite": suite.name, "row": row,
                "nll": float(loss.nll[place]), "weight": float(loss.weight[place]), "labels": labels[place],
                "shared_nats": shared[place],
            }
            for place, row in enumerate(chunk)
        )  # fmt: skip


def _answer(opened: OpenedModel, suite: Suite, who: str, log: RowLog, count: int, sampling: Sampling) -> None:
    rows = answered_rows(suite.rows, count)
    todo = log.missing("text", who, suite.name, rows)
    with Progress(f"answers, {who}", len(rows), "rows") as progress:
        progress.start_at(len(rows) - len(todo))
        for chunk in _chunks(todo, PROMPTS_AT_ONCE):
            prompts = [render_prompt(suite.rows.records[n], suite.data) for n in chunk]
            answers = generate(opened.base.model, prompts, sampling, numbers=chunk)
            log.append(_text_line(who, suite, row, tokens) for row, tokens in zip(chunk, answers, strict=True))
            progress.advance(len(chunk))


def _text_line(who: str, suite: Suite, row: int, tokens: list[int]) -> dict[str, Any]:
    record = suite.rows.records[row]
    read = read_completion(tokens, record.conversation.tools.recipients)
    question = next((message.content for message in reversed(record.messages) if message.role == "user"), "")
    return {
        "measured": "text", "who": who, "suite": suite.name, "row": row, "tokens": len(tokens),
        "question": question, "answer": record.answer,
        "final": read.final, "analysis": read.analysis, "stopped": read.stopped, "error": read.error,
    }  # fmt: skip


def _chunks(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def answered_rows(rows: TestSet, count: int) -> list[int]:
    """Numbers of the rows that are answered: evenly spread, so that they do not depend on a seed."""
    total = len(rows.records)
    return list(range(total)) if count >= total else [number * total // count for number in range(count)]
