"""Log lines and progress: plain text in a pipe, bars and colours on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import log

PROGRAM = """
import sys
from finetune import log
log.REDRAW_SECONDS = log.PLAIN_LINE_SECONDS = 0
log.info("first line")
with log.Progress("training", 3, "steps") as progress:
    progress.show(1, "loss [2.5]")
    log.info("in between: [brackets] stay")
    log.warning("careful: half of it")
    log.result("a result")
    with log.Progress("evaluating", 2, "examples") as inner:
        inner.advance(2)
    progress.show(3)
log.result_table([["ok", "python", "3.11"], ["BAD", "torch with a long name", "missing"]], ["green", "red"])
log.error("error: the end")
print("rich" in sys.modules, file=sys.stderr)
"""
PLAIN_ERR = """first line
training 1/3 steps, loss [2.5]
in between: [brackets] stay
warning: careful: half of it
evaluating 2/2 examples
training 3/3 steps
error: the end
False
"""
PLAIN_OUT = """a result
ok   python                  3.11
BAD  torch with a long name  missing
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_a_terminal(stdout: int | None, **environment: str) -> str:
    """Output of the program on a terminal as standard error, and as standard output unless another is given."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stderr=child,
        stdout=child if stdout is None else stdout,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment},
    )
    os.close(child)
    written = b""
    try:
        while piece := os.read(parent, 65536):
            written += piece
    except OSError:  # Linux ends a terminal's output so
        pass
    assert process.wait(60) == 0
    os.close(parent)
    return written.decode()


def test_a_pipe_gets_plain_lines_and_rich_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    time_left = re.compile(r", \d+ s left")
    assert time_left.sub("", done.stderr) == PLAIN_ERR
    assert done.stdout == PLAIN_OUT


def test_a_terminal_gets_bars_colours_and_every_line() -> None:
    written = on_a_terminal(None)
    assert "\x1b[33mwarning:\x1b[0m careful: half of it" in written
    assert "\x1b[1;31merror:\x1b[0m the end" in written
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in written and "training 1/3 steps, loss [2.5]" in written
    lines = [line.strip() for line in CONTROL.sub("", written).replace("\r", "\n").splitlines()]
    for line in ("in between: [brackets] stay", "a result", "evaluating 2/2 examples", "training 3/3 steps", "True"):
        assert line in lines, lines
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor stays visible"


def test_results_stay_in_their_pipe_while_the_terminal_has_bars(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        written = on_a_terminal(out.fileno())
    assert (tmp_path / "out").read_text() == PLAIN_OUT
    assert "a result" not in written


def test_no_colour_and_dumb_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b[33m" not in on_a_terminal(None, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(None, TERM="dumb")


def test_other_ranks_print_errors_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(log, "_rank", 1)
    log.info("not printed")
    log.result("not printed")
    log.result_table([["not", "printed"]])
    log.error("error: out of memory")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "rank 1: error: out of memory\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (8040, "2 h 14 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert log.duration(seconds) == text


def test_text_of_any_origin_is_safe_to_print(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences are spelt out, and passwords of URLs replaced, in every way of printing."""
    wild = "\x1b]0;title\x07 \u202eevil https://me:hunter2@host/x hf://token123@host"
    for put in (log.info, log.warning, log.error, log.result):
        put(wild)
    log.result_table([[wild, "b"]])
    with log.Progress(wild, 1, "units") as progress:
        progress.show(1, wild, force=True)
    printed = "".join(capsys.readouterr())
    assert printed.count("\\x1b]0;title\\x07 \\u202eevil https://***@host/x hf://***@host") == 7
    assert not {"\x1b", "\x07", "\u202e"} & set(printed) and "hunter2" not in printed and "token123" not in printed
    log.result("\x1b[2mdim\x1b[0m", styled=True)
    assert "\x1b[2m" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_a_terminal_lacks_are_spelt_out(encoding: str, tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "\U0001f600 Привет"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    recipe = "# @package _global_\ndefaults:\n  - override /model: tiny\n"
    recipe += "data: {cache: false, max_length: 512, train: {mine: {path: a.jsonl}}}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    command = [sys.executable, "-m", "finetune", "data", "preview", "r.yaml"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "\\U0001f600 \\u041f".encode(encoding) in done.stdout
