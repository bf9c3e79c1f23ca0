"""Figures row by row, on disk as they come, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from finetune import log
from finetune.data.harmony.render import render_prompt
from finetune.errors import CheckError, ConfigError
from finetune.evaluate.evalset import EvalSet, Suite
from finetune.evaluate.generation import Sampling, generate, read_completion
from finetune.evaluate.labels import score_labels
from finetune.evaluate.likelihood import held_out_loss
from finetune.evaluate.opening import LoadedModel
from finetune.files import write_text

Key = tuple[str, str, str, int]
"""What was measured (`score` or `text`), by whom (`base` or `adapter`), of which suite, on which row."""


class MeasurementLog:
    """A JSONL file: a first line that says what it belongs to, then one line a row.

    Args:
        path: made if it does not exist.
        belongs_to: plain facts; all figures in the file were measured under these.

    Raises:
        ConfigError: the file belongs to something else.
    """

    def __init__(self, path: Path, belongs_to: Mapping[str, Any]) -> None:
        self._path, self.rows = path, dict[Key, dict[str, Any]]()
        lines = list(_whole_lines(path))
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"belongs_to": belongs_to}) + "\n", encoding="utf-8")
            return
        there = lines[0].get("belongs_to", {})
        if there != belongs_to:
            differing = sorted(key for key in {*there, *belongs_to} if there.get(key) != belongs_to.get(key))
            raise ConfigError(
                f"{path} holds another evaluation's figures",
                why=f"it differs in {', '.join(differing)}",
                fix="choose another directory with --out, or remove it",
            )
        for line in lines[1:]:
            self.rows[_key(line)] = line
        # A line cut short by a kill would otherwise swallow the next one.
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def missing(self, measured: str, who: str, suite: str, rows: Iterable[int]) -> list[int]:
        """Those of `rows` that are not there yet."""
        return [row for row in rows if (measured, who, suite, row) not in self.rows]

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines with `measured`, `who`, `suite` and `row`, and put them on disk."""
        with self._path.open("a", encoding="utf-8") as file:
            for line in lines:
                self.rows[_key(line)] = dict(line)
                file.write(json.dumps(line) + "\n")


def _key(line: Mapping[str, Any]) -> Key:
    return line["measured"], line["who"], line["suite"], line["row"]


def _whole_lines(path: Path) -> Iterable[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            yield json.loads(text)
        except ValueError:
            return


# Base against base + adapter on the same rows: losses, label scores and generated answers, row by row.

WHO = ("base", "adapter")
ROWS_AT_ONCE = 128
PROMPTS_AT_ONCE = 8


def measure(
    opened: LoadedModel, suites: Sequence[Suite], row_log: MeasurementLog, *, num_generated: int, sampling: Sampling
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


def _score(opened: LoadedModel, suite: Suite, who: str, row_log: MeasurementLog) -> None:
    rows, labelled = suite.rows, suite.rows.labelled_examples
    todo = row_log.missing("score", who, suite.name, range(len(rows.samples)))
    total, left = len(rows.samples) + len(labelled), len(todo) + len(labelled.intersection(todo))
    with log.Progress(f"{suite.name}, {who}", total, "losses and labels") as progress:
        progress.start_at(total - left)
        for chunk in _chunks(todo, ROWS_AT_ONCE):
            _score_chunk(opened, suite, who, row_log, chunk, progress)


def _score_chunk(
    opened: LoadedModel, suite: Suite, who: str, row_log: MeasurementLog, chunk: Sequence[int], progress: log.Progress
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
    labelled = rows.labelled_examples
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


def _answer(
    opened: LoadedModel, suite: Suite, who: str, row_log: MeasurementLog, count: int, sampling: Sampling
) -> None:
    rows = answered_examples(suite.rows, count)
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


def answered_examples(rows: EvalSet, count: int) -> list[int]:
    """Numbers of the rows that are answered: conversations, each once, evenly spread and so the same for every seed."""
    asking = [row for row in rows.first_examples if rows.records[row].conversation.text is None]
    total = len(asking)
    return asking if count >= total else [asking[number * total // count] for number in range(count)]
