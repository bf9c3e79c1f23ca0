"""What a person sees while something runs: plain lines, and a progress line that a terminal redraws.

Everything goes to standard error except results (`say(..., result=True)`), so that output can be piped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

# Imports take seconds, and longer on a busy machine or a network disk: nothing else would be said meanwhile.
LOADING = "loading torch, transformers and PEFT"
REDRAW_SECONDS = 0.2
PLAIN_LINE_SECONDS = 10.0


_warnings: list[str] = []  # of this process, for the run's report
_open_line = False  # is there a progress line on the terminal that no newline has ended yet?
_aside = False  # do results go to standard error, because standard output is for one JSON object?
_process: int | None = None  # this process's number, where the first one speaks for all


def speak_as(process: int) -> None:
    """Leave printing to process 0 of a run of several; errors are printed by whom they befall, with its number."""
    global _process
    _process = process


def complain(text: str) -> None:
    """Print an error: also from a process that leaves everything else to the first."""
    if _process:
        print(f"process {_process}: {text}", file=sys.stderr, flush=True)
    else:
        say(text)


def say(text: str = "", *, result: bool = False) -> None:
    """Print a line: to standard output if it is the command's result, to standard error otherwise."""
    global _open_line
    if _process:
        return
    if _open_line:  # take the progress line's place; it is drawn again below when due
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        _open_line = False
    print(text, file=sys.stdout if result and not _aside else sys.stderr, flush=True)


@contextmanager
def results_aside(wanted: bool) -> Iterator[None]:
    """While a command answers with `answer` alone, send everything else to standard error; nothing if not wanted."""
    global _aside
    before, _aside = _aside, wanted
    try:
        yield
    finally:
        _aside = before


def answer(facts: object) -> None:
    """Print a command's result as JSON on standard output; paths become strings."""
    if not _process:
        print(json.dumps(facts, indent=1, default=str), flush=True)


def warn(text: str) -> None:
    """Print a line that the person should not miss."""
    _warnings.append(text)
    say(f"warning: {text}")


def warnings_so_far() -> tuple[str, ...]:
    """What `warn` was given in this process, in order."""
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
        if _process:
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
            say(line)

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
