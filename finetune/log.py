"""Log lines, results and progress of a command: plain lines, and with Rich a bar and colours on a terminal.

Everything goes to standard error except results (`result`, `result_json`), so that output can be piped. Rich is
imported when the first bar, colour or table goes to a terminal; elsewhere every line is plain text.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

# Imports take seconds, and longer on a busy machine or a network disk: nothing else would be logged meanwhile.
LOADING = "loading torch, transformers and PEFT"
REDRAW_SECONDS = 0.2
PLAIN_LINE_SECONDS = 10.0


# C0 without newline and tab, DEL and C1 steer terminals; the others reorder or hide the text around them
# (bidirectional marks and overrides, zero-width characters, line separators, tags), as in "Trojan Source" attacks, or
# are half a surrogate pair, which cannot be printed at all.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_PASSWORD = re.compile(r"(\w+://)[^/\s@]+@")  # the user's name and password, or a token, in a URL

_warnings: list[str] = []  # of this process, for the run's report
_bars: Bars | None = None  # the bars that the terminal shows now, one per open Progress
_results_to_stderr = False  # because standard output carries one JSON object
_rank: int | None = None  # of this process in a run of several; rank 0 prints


def set_rank(rank: int) -> None:
    """Print on rank 0 only from now on; errors are still printed by the rank they occur on, with its number."""
    global _rank
    _rank = rank


def info(text: str = "") -> None:
    """Print a line to standard error."""
    _print(text, sys.stderr)


def result(text: str = "", *, styled: bool = False) -> None:
    """Print a line of the command's result to standard output.

    Args:
        text: the line.
        styled: it has the caller's own colours, and all else in it is printable.
    """
    _print(text, _result_stream(), styled=styled)


def result_table(rows: Sequence[Sequence[str]], colors: Sequence[str] = ()) -> None:
    """Print a table to standard output.

    Args:
        rows: cells of each row. A terminal wraps the last column; elsewhere columns are padded, two spaces apart.
        colors: Rich's style of each row's first cell on a terminal.
    """
    stream = _result_stream()
    if _rank:
        return
    rows = [[safe(cell) for cell in row] for row in rows]
    if not is_terminal(stream):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        for row in rows:
            padded = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)]
            print("  ".join([*padded, row[-1]]), file=stream, flush=True)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for number, row in enumerate(rows):
        styles = [colors[number] if colors else "bold", *[""] * (len(row) - 1)]
        table.add_row(*(Text(cell, style) for cell, style in zip(row, styles, strict=True)))
    _console(stream).print(table)


def warning(text: str) -> None:
    """Print a warning and keep it for the run's report."""
    _warnings.append(text)
    _print(f"warning: {text}", sys.stderr, "yellow")


def error(text: str) -> None:
    """Print an error, on any rank."""
    if _rank:
        print(f"rank {_rank}: {safe(text)}", file=sys.stderr, flush=True)
    else:
        _print(text, sys.stderr, "bold red")


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


def safe(text: str) -> str:
    r"""Make text of any origin fit for a terminal: no control sequences, no passwords of URLs.

    >>> safe("https://me:secret@host/x \x1b[2J")
    'https://***@host/x \\x1b[2J'
    """
    return without_passwords(printable(text))


def without_passwords(text: str) -> str:
    """Replace user names, passwords and tokens in URLs by `***`."""
    return _PASSWORD.sub(r"\1***@", text)


def printable(text: str) -> str:
    r"""Spell out control characters and characters that reorder text; newlines and tabs stay.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return _UNSAFE.sub(lambda match: _spelled(ord(match[0])), text)


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


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


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that understands control sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """Progress of a task: a bar on a terminal, a plain line now and then elsewhere.

    Args:
        task: what is being done, such as "reading shards".
        total: number of units, or None when unknown.
        unit: the unit's plural, such as "tensors".

    Use as a context manager and call `advance` (or `show` to set the position and add details).
    """

    def __init__(self, task: str, total: int | None, unit: str) -> None:
        self.task, self.total, self.unit = task, total, unit
        self.done = self._first = 0
        self._start = time.monotonic()
        self._last_print = self._start
        self._terminal = is_terminal(sys.stderr)
        self._printed = False
        self._bar: TaskID | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            _close_bar(self._bar)
            self._bar = None

    def start_at(self, done: int) -> None:
        """Begin in the middle: units done by an earlier process do not count for the time left."""
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
        line = safe(self._line(now, details))
        if self._terminal:
            self._bar = _draw_bar(self._bar, line, done, self.total)
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


def _result_stream() -> TextIO:
    return sys.stderr if _results_to_stderr else sys.stdout


def _print(text: str, stream: TextIO, color: str | None = None, *, styled: bool = False) -> None:
    """Print a line, above the bars if there are any; a colour is for the text up to its first colon."""
    if _rank:
        return
    text = text if styled else safe(text)
    if _bars is None and (color is None or not is_terminal(stream)):
        print(text, file=stream, flush=True)
        return
    from rich.text import Text

    head, colon, rest = text.partition(":")
    line = Text.assemble((head + colon, color), rest) if color and colon else Text(text)
    if _bars is not None and not is_terminal(stream):  # the bars are on standard error
        print(text, file=stream, flush=True)
    else:
        console = _bars.console if _bars is not None else _console(stream)
        console.print(line, soft_wrap=True)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False)


def _draw_bar(bar: TaskID | None, line: str, done: int, total: int | None) -> TaskID:
    """Draw a bar beside its line; with several open tasks each has a bar."""
    global _bars
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    if _bars is None:
        text = TextColumn("{task.description}", markup=False)
        # Drawn only here: a thread that redraws would take the interpreter from the training step.
        _bars = Bars(
            BarColumn(bar_width=24),
            text,
            console=_console(sys.stderr),
            auto_refresh=False,
            transient=True,
            redirect_stdout=is_terminal(sys.stdout),  # else a pipe's lines would go to the terminal
        )
        _bars.start()
        _bars.console.show_cursor(True)  # a killed process could not bring it back
    if bar is None:
        bar = _bars.add_task(line, total=total)
    _bars.update(bar, description=line, completed=done, refresh=True)
    return bar


def _close_bar(bar: TaskID) -> None:
    """Take a bar away and leave its last line."""
    global _bars
    if _bars is None:
        return
    last = next(task.description for task in _bars.tasks if task.id == bar)
    _bars.remove_task(bar)
    if _bars.tasks:
        info(last)
        return
    bars, _bars = _bars, None
    bars.stop()
    info(last)
