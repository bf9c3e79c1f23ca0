"""Log lines, results and progress of a command: plain lines, and a progress line that a terminal redraws.

Everything goes to standard error except results (`result`, `result_json`), so that output can be piped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

# Imports take seconds, and longer on a busy machine or a network disk: nothing else would be said meanwhile.
LOADING = "loading torch, transformers and PEFT"
REDRAW_SECONDS = 0.2
PLAIN_LINE_SECONDS = 10.0


_warnings: list[str] = []  # of this process, for the run's report
_open_line = False  # whether the terminal shows a progress line that no newline has ended yet
_results_to_stderr = False  # because standard output carries one JSON object
_rank: int | None = None  # of this process in a run of several; rank 0 prints


def set_rank(rank: int) -> None:
    """Print on rank 0 only from now on; errors are still printed by the rank they occur on, with its number."""
    global _rank
    _rank = rank


def info(text: str = "") -> None:
    """Print a line to standard error."""
    _print(text, sys.stderr)


def result(text: str = "") -> None:
    """Print a line of the command's result to standard output."""
    _print(text, sys.stderr if _results_to_stderr else sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    global _open_line
    if _rank:
        return
    if _open_line:  # replace the progress line; it is drawn again below when due
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        _open_line = False
    print(text, file=stream, flush=True)


def warning(text: str) -> None:
    """Print a warning and keep it for the run's report."""
    _warnings.append(text)
    info(f"warning: {text}")


def error(text: str) -> None:
    """Print an error, on any rank."""
    if _rank:
        print(f"process {_rank}: {text}", file=sys.stderr, flush=True)
    else:
        info(text)


@contextmanager
def results_to_stderr(wanted: bool) -> Iterator[None]:
    """If wanted, send `result` lines to standard error while a command prints one JSON object (`result_json`)."""
    global _results_to_stderr
    before, _results_to_stderr = _results_to_stderr, wanted
    try:
        yield
    finally:
        _results_to_stderr = before


def result_json(record: object) -> None:
    """Print the command's result as JSON on standard output; paths become strings."""
    if not _rank:
        print(json.dumps(record, indent=1, default=str), flush=True)


def warnings_so_far() -> tuple[str, ...]:
    """Texts given to `warning` in this process, in order."""
    return tuple(_warnings)


def duration(seconds: float) -> str:
    """Write seconds as `42 s`, `3 min 5 s` or `2 h 14 min`.

    >>> duration(185)
    '3 min 5 s'
    """
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


class Progress:
    """One line of progress: redrawn on a terminal, printed now and then elsewhere.

    Args:
        task: what is being done, such as "reading shards".
        total: how many units there are, or None when unknown.
        unit: the unit's plural, such as "rows".

    Use as a context manager and call `advance` (or `show` to set the position and add details).
    """

    def __init__(self, task: str, total: int | None, unit: str) -> None:
        self.task, self.total, self.unit = task, total, unit
        self.done = self._first = 0
        self._start = time.monotonic()
        self._last_print = self._start
        self._terminal = sys.stderr.isatty()
        self._printed = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _open_line
        if _open_line:
            print(file=sys.stderr, flush=True)
            _open_line = False

    def start_at(self, done: int) -> None:
        """Begin in the middle: units done in an earlier sitting do not count for the time left."""
        self.done = self._first = done

    def advance(self, units: int = 1, details: str = "") -> None:
        """Move on by `units` and redraw when due."""
        self.show(self.done + units, details)

    def show(self, done: int, details: str = "", *, force: bool = False) -> None:
        """Set the position to `done` units and redraw when due, when `force` says so, and at the end."""
        self.done = done
        if _rank:
            return
        now = time.monotonic()
        due = REDRAW_SECONDS if self._terminal else PLAIN_LINE_SECONDS
        finished = self.total is not None and done >= self.total
        if not force and now - self._last_print < due and not (finished and (self._terminal or self._printed)):
            return
        self._last_print, self._printed = now, True
        line = self._line(now, details)
        if self._terminal:
            global _open_line
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            _open_line = True
        else:
            info(line)

    def _line(self, now: float, details: str) -> str:
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        parts = [f"{self.task} {count} {self.unit}"]
        if details:
            parts.append(details)
        elapsed = now - self._start
        here = self.done - self._first
        if self.total and here > 0 and self.done < self.total:
            parts.append(f"{duration(elapsed / here * (self.total - self.done))} left")
        return ", ".join(parts)
