"""Figures row by row, on disk as they come, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError

Key = tuple[str, str, str, int]
"""What was measured (`score` or `text`), by whom (`base` or `adapter`), of which suite, on which row."""


class RowLog:
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
        staging = path.with_name(f"{path.name}.partial")
        staging.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(staging, path)  # a kill in between leaves the file as it was

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
