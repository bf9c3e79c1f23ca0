"""A run directory as reports read it: whatever is there, complete or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from finetune import log
from finetune.config.old_keys import current_data
from finetune.errors import InputError
from finetune.files import JsonObject
from finetune.records import parse_line
from finetune.report.survival import Survival, read_survival
from finetune.results import Evaluation, read_evaluation

STEP_FIGURES = {
    "loss",
    "balance_loss",
    "router_z_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "memory_gib",
}
"""Floating-point figures that every step's metrics have, whatever the objective."""


@dataclass(frozen=True)
class ShownAnswer:
    """A generated answer: the number of its example, the model, what was asked, the record's answer, the final text."""

    row: int
    who: str
    question: str
    answer: str | None
    final: str

    @classmethod
    def of(cls, line: JsonObject) -> ShownAnswer:
        """From a line of rows.jsonl; whatever is missing is empty."""
        answer = line.get("answer")
        return cls(
            int(line.get("row", 0)),
            str(line.get("who")),
            str(line.get("question") or ""),
            None if answer is None else str(answer),
            str(line.get("final") or ""),
        )


@dataclass(frozen=True)
class TrainedExample:
    """A training example: its record, and its text in pieces, which are trained or context."""

    where: str
    pieces: Sequence[tuple[str, bool]]

    @classmethod
    def of(cls, content: JsonObject) -> TrainedExample:
        """From sample.json."""
        pieces = [piece for piece in content.get("pieces") or [] if isinstance(piece, Mapping)]
        texts = [(str(piece.get("text", "")), bool(piece.get("weight"))) for piece in pieces]
        return cls(str(content.get("where", "")), texts)


@dataclass(frozen=True)
class RunFiles:
    """The files of a run directory; each is empty or None when it is missing, half-written or in another form.

    Attributes:
        path: the directory.
        config: config.yaml as plain data.
        manifest: manifest.json.
        trained: evaluation.json, which the training run wrote.
        compared: evaluation/summary.json, which `finetune evaluate` wrote.
        metrics: lines of metrics.jsonl.
        answers: generated answers, lines of evaluation/rows.jsonl.
        example: sample.json, a training example.
        survival: what merges to MXFP4 kept (survival-TARGET.json).
        unreadable: a sentence on each file that is there and could not be read.
    """

    path: Path
    config: JsonObject
    manifest: JsonObject
    trained: Evaluation | None
    compared: Evaluation | None
    metrics: list[JsonObject]
    answers: list[ShownAnswer]
    example: TrainedExample
    survival: list[Survival]
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, run: Path) -> RunFiles:
        """Read a run directory."""
        unreadable: list[str] = []
        rows = read_lines(run / "evaluation" / "rows.jsonl", unreadable)
        return cls(
            path=run,
            config=_read_config(run / "config.yaml", unreadable),
            manifest=read_json(run / "manifest.json", unreadable),
            trained=_evaluation(run / "evaluation.json", unreadable),
            compared=_evaluation(run / "evaluation" / "summary.json", unreadable),
            metrics=read_lines(run / "metrics.jsonl", unreadable),
            answers=[ShownAnswer.of(line) for line in rows if line.get("measured") == "text"],
            example=TrainedExample.of(read_json(run / "sample.json", unreadable)),
            survival=read_survival(run),
            unreadable=unreadable,
        )

    def other_terms(self) -> list[str]:
        """Names of an objective's terms in the steps' metrics beyond those that every run has, in order."""
        steps = (line for line in self.metrics if line.get("kind") == "step")
        names = dict.fromkeys(name for line in steps for name, value in line.items() if isinstance(value, float))
        return [name for name in names if name not in STEP_FIGURES]

    def lines(self, kind: str, *keys: str) -> list[JsonObject]:
        """Metrics lines of a kind that have numbers under all of `keys`."""
        numbers = (int, float)
        return [
            line
            for line in self.metrics
            if line.get("kind") == kind and all(isinstance(line.get(key), numbers) for key in ("step", *keys))
        ]


def read_json(path: Path, unreadable: list[str] | None = None) -> JsonObject:
    """A JSON object, {} if the file is missing or holds anything else (then `unreadable` says so)."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content
    if unreadable is not None:
        unreadable.append(_left_out(path))
    return {}


def read_lines(path: Path, unreadable: list[str]) -> list[JsonObject]:
    """JSON objects of a JSONL file; `unreadable` counts the others, but for a half-written last line."""
    lines: list[JsonObject] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        unreadable.append(_left_out(path))
        return []
    num_bad = 0
    for line in text.split("\n")[:-1]:
        try:
            lines.append(parse_line(line))
        except ValueError:
            num_bad += 1
    if num_bad:
        unreadable.append(f"{path.name}: {num_bad:,} lines could not be read or were changed, and are left out")
    return lines


def _left_out(path: Path) -> str:
    return f"{path.name} could not be read and is left out"


def _evaluation(path: Path, unreadable: list[str]) -> Evaluation | None:
    try:
        return read_evaluation(path)
    except InputError as error:
        unreadable.append(f"{path.name} is left out: {error.what.replace(str(path), 'it')}")
        log.warning(f"the report leaves out {error.what}")
        return None


def _read_config(path: Path, unreadable: list[str]) -> JsonObject:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return current_data(content)
    unreadable.append(_left_out(path))
    return {}
