"""A run directory as reports read it: whatever is there, complete or not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.config.old_keys import current_data
from finetune.errors import InputError
from finetune.report.survival import Survival, read_survival
from finetune.results import Evaluation, read_evaluation


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
        sample: sample.json, a training example's pieces with their weights.
        survival: what merges to MXFP4 kept (survival-TARGET.json).
        unreadable: names of files that are there and could not be read.
    """

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    trained: Evaluation | None
    compared: Evaluation | None
    metrics: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    sample: dict[str, Any]
    survival: list[Survival]
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, run: Path) -> RunFiles:
        """Read a run directory."""
        unreadable: list[str] = []
        return cls(
            path=run,
            config=_read_config(run / "config.yaml", unreadable),
            manifest=read_json(run / "manifest.json", unreadable),
            trained=_evaluation(run / "evaluation.json", unreadable),
            compared=_evaluation(run / "evaluation" / "summary.json", unreadable),
            metrics=read_lines(run / "metrics.jsonl"),
            answers=[line for line in read_lines(run / "evaluation/rows.jsonl") if line.get("measured") == "text"],
            sample=read_json(run / "sample.json", unreadable),
            survival=read_survival(run),
            unreadable=unreadable,
        )

    def lines(self, kind: str, *keys: str) -> list[dict[str, Any]]:
        """Metrics lines of a kind that have numbers under all of `keys`."""
        numbers = (int, float)
        return [
            line
            for line in self.metrics
            if line.get("kind") == kind and all(isinstance(line.get(key), numbers) for key in ("step", *keys))
        ]


def read_json(path: Path, unreadable: list[str] | None = None) -> dict[str, Any]:
    """A JSON object, {} if the file is missing or holds anything else (then `unreadable` gets its name)."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict):
        return content
    if unreadable is not None:
        unreadable.append(path.name)
    return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Complete JSON objects of a JSONL file; other lines, such as a half-written last one, are left out."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            lines.append(content)
    return lines


def _evaluation(path: Path, unreadable: list[str]) -> Evaluation | None:
    try:
        return read_evaluation(path)
    except InputError:
        unreadable.append(path.name)
        return None


def _read_config(path: Path, unreadable: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        content = None
    if isinstance(content, dict):
        return current_data(content)
    unreadable.append(path.name)
    return {}
