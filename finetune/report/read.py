"""A run directory as reports see it: whatever is there, whole or not, and nothing that is not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.config.old_keys import current_data
from finetune.report.survival import Survival, read_survival


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; each part is empty when its file is missing, half-written or of another form.

    Attributes:
        path: the directory.
        config: config.yaml as plain data.
        manifest: manifest.json.
        evaluation: evaluation.json, `before` and `after`.
        metrics: lines of metrics.jsonl.
        comparison: evaluation/summary.json, which `finetune evaluate` writes.
        answers: generated answers, lines of evaluation/rows.jsonl.
        sample: sample.json, a training sample's pieces with their weights.
        survival: what merges to MXFP4 kept (survival-TARGET.json).
        unreadable: files that are there and could not be read.
    """

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    comparison: dict[str, Any]
    answers: list[dict[str, Any]]
    sample: dict[str, Any]
    survival: list[Survival]
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, run: Path) -> RunFiles:
        """Read a run directory."""
        unreadable: list[str] = []

        def content(name: str) -> dict[str, Any]:
            return read_json(run / name, unreadable)

        return cls(
            path=run,
            config=_read_config(run / "config.yaml", unreadable),
            manifest=content("manifest.json"),
            evaluation=content("evaluation.json"),
            metrics=read_lines(run / "metrics.jsonl"),
            comparison=content("evaluation/summary.json"),
            answers=[line for line in read_lines(run / "evaluation/rows.jsonl") if line.get("measured") == "text"],
            sample=content("sample.json"),
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
    """Whole JSON objects of a JSONL file, line by line; others, such as a half-written last line, are left out."""
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
