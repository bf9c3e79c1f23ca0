"""Base against base + adapter on the same rows: losses, label scores and generated answers, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from finetune import log
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
    opened: OpenedModel, suites: Sequence[Suite], row_log: RowLog, *, num_generated: int, sampling: Sampling
) -> None:
    """Fill a row log with what is missing in it.

    Args:
        opened: base and adapter.
        suites: what to score; the first one's prompts are answered too.
        row_log: rows measured already are not measured again.
        num_generated: how many rows of the first suite are answered.
        sampling: how.

    Raises:
        CheckError: a loss or a label's score is not finite.
        InputError: a row's answer is not among its suite's labels.
    """
    for who in WHO:
        with nullcontext() if who == "adapter" else opened.adapter.disabled():
            for suite in suites:
                _score(opened, suite, who, row_log)
            if suites and num_generated:
                _answer(opened, suites[0], who, row_log, num_generated, sampling)


def _score(opened: OpenedModel, suite: Suite, who: str, row_log: RowLog) -> None:
    rows, labelled = suite.rows, suite.rows.labelled_rows
    todo = row_log.missing("score", who, suite.name, range(len(rows.samples)))
    total, left = len(rows.samples) + len(labelled), len(todo) + len(labelled.intersection(todo))
    with log.Progress(f"{suite.name}, {who}", total, "losses and labels") as progress:
        progress.start_at(total - left)
        for chunk in _chunks(todo, ROWS_AT_ONCE):
            _score_chunk(opened, suite, who, row_log, chunk, progress)


def _score_chunk(
    opened: OpenedModel, suite: Suite, who: str, row_log: RowLog, chunk: Sequence[int], progress: log.Progress
) -> None:
    model, rows = opened.base.model, suite.rows
    samples = [rows.samples[n] for n in chunk]
    row_tokens = max(suite.data.max_length, *(len(sample.ids) for sample in samples))
    loss = held_out_loss(model, samples, row_tokens, progress=progress)
    for row, value in zip(chunk, loss.nll, strict=True):
        if not math.isfinite(value):
            raise CheckError(
                f"{suite.name}: the loss of {who} on {rows.records[row].where} is {value}",
                why="the model's numbers left the range of its dtype",
                fix="check the base, the adapter and this row",
            )
    labels: dict[int, list[float]] = {}
    shared: dict[int, float] = {}
    labelled = rows.labelled_rows
    asked = [n for n in chunk if n in labelled]
    if rows.labels is not None and asked:
        scores = score_labels(model, [rows.records[n] for n in asked], rows.labels, suite.data, progress=progress)
        labels = dict(zip(asked, scores.log_likelihood.tolist(), strict=True))
        if scores.shared is not None:
            shared = dict(zip(asked, scores.shared.tolist(), strict=True))
    row_log.append(
        {
            "measured": "score", "who": who, "suite": suite.name, "row": row,
            "nll": float(loss.nll[place]), "weight": float(loss.weight[place]), "labels": labels.get(row),
            "shared_nats": shared.get(row),
        }
        for place, row in enumerate(chunk)
    )  # fmt: skip


def _answer(opened: OpenedModel, suite: Suite, who: str, row_log: RowLog, count: int, sampling: Sampling) -> None:
    rows = answered_rows(suite.rows, count)
    todo = row_log.missing("text", who, suite.name, rows)
    with log.Progress(f"answers, {who}", len(rows), "rows") as progress:
        progress.start_at(len(rows) - len(todo))
        for chunk in _chunks(todo, PROMPTS_AT_ONCE):
            prompts = [render_prompt(suite.rows.records[n], suite.data) for n in chunk]
            answers = generate(opened.base.model, prompts, sampling, numbers=chunk)
            row_log.append(_text_line(who, suite, row, tokens) for row, tokens in zip(chunk, answers, strict=True))
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
    """Numbers of the rows that are answered: conversations, each once, evenly spread and so the same for every seed."""
    asking = [row for row in rows.first_rows if rows.records[row].conversation.text is None]
    total = len(asking)
    return asking if count >= total else [asking[number * total // count] for number in range(count)]
