"""Commands that write files, killed before every file operation and started twice at once; parts of `bench/faults.py`.

A killed command must leave the target as it was or whole, and the same command must then do what it does undisturbed.
Of two at once one writes; the other ends with exit code 2, names the first and writes nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from fault_hooks import Hook, before, nothing

OPERATIONS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "link", "truncate", "fchmod")
VOLATILE = ("export.json", "README.md")  # they have the date; their parts are compared by the files that they name
Start = Callable[[list[str], Hook], int]
"""Runs a command in a process of its own with a hook and gives its exit code, or minus the signal."""


@dataclass(frozen=True)
class Command:
    """A command that writes a target.

    Attributes:
        name: for the table.
        words: given the target, the command line.
        clear: removes what an earlier round has written.
    """

    name: str
    words: Callable[[Path], list[str]]
    clear: Callable[[Path], None]


def remove(target: Path) -> None:
    """Remove a target and everything beside it that belongs to it."""
    for path in [target, *target.parent.glob(f".{target.name}*"), *target.parent.glob(f"{target.name}.*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def commands(run: Path) -> list[Command]:
    """The commands, on a finished run and two copies of its adapter."""
    return [
        Command("adapter combine", lambda out: _combine(run, out), remove),
        Command("export --to peft, card", lambda out: _export(run, "peft", out), remove),
        Command("report", lambda out: ["report", str(out)], nothing_to_clear),
        Command("base tiny", lambda out: ["base", "tiny", str(out), "--kind", "random"], remove),
        Command("export --to bf16, card", lambda out: _export(run, "bf16", out), remove),
        Command("evaluate", lambda out: ["evaluate", str(run), "--out", str(out)], remove),
    ]


def nothing_to_clear(_target: Path) -> None:
    """A report is rewritten in its place."""


def _combine(run: Path, out: Path) -> list[str]:
    return ["adapter", "combine", f"{run}:0.5", f"{run}:0.5", "--out", str(out)]


def _export(run: Path, target: str, out: Path) -> list[str]:
    return ["export", str(run), "--to", target, "--out", str(out), "--no-verify"]


def content(target: Path) -> dict[str, str]:
    """SHA-256 of every file below a target, without those that carry a date, and the names of all."""
    found = {}
    for path in sorted(target.rglob("*")) if target.is_dir() else []:
        if path.is_file() and not path.name.startswith("."):
            dated = path.name in VOLATILE
            found[str(path.relative_to(target))] = "" if dated else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def left_behind(target: Path) -> tuple[tuple[str, int], ...]:
    """Name and bytes of every file of a target and of what is unfinished beside it."""
    beside = (path for path in target.parent.iterdir() if target.name in path.name and not path.name.endswith(".lock"))
    files = (
        file for path in beside for file in (path, *path.rglob("*")) if file.is_file() and ".lock" not in file.name
    )
    return tuple(sorted((str(file.relative_to(target.parent)), file.stat().st_size) for file in files))


def before_operation(number: int | None, counted: Path) -> Hook:
    """kill -9 before the n-th file operation (from 0); None: write how many there were to `counted`."""

    def hook() -> None:
        done = 0

        def count() -> None:
            nonlocal done
            if number is not None and done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            if number is None:
                descriptor = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.write(descriptor, str(done).encode())
                os.close(descriptor)

        for name in OPERATIONS:
            before(os, name, count)
        before(safetensors.torch, "save_file", count)

    return hook


def killed_at_every_operation(start: Start, command: Command, target: Path) -> tuple[int, list[str]]:
    """Kill the command before each of its file operations; repeat it once for every different state that a kill left.

    Returns:
        How many there are, and what went wrong, in words.
    """
    counted = target.with_name("counted")
    command.clear(target)
    assert start(command.words(target), before_operation(None, counted)) == 0
    wanted, total = content(target), int(counted.read_text())
    wrong, repeated = [], set()
    for number in range(total):
        command.clear(target)
        code = start(command.words(target), before_operation(number, counted))
        after = content(target)
        is_evaluation = command.name == "evaluate"  # its measured examples stay, and are not measured again
        if code != -signal.SIGKILL:
            wrong.append(f"operation {number}: {code} instead of being killed")
        if after and after != wanted and not is_evaluation:
            wrong.append(f"operation {number}: half of the files have their final names")
        left = left_behind(target)
        if left in repeated:
            continue
        repeated.add(left)
        again = start(command.words(target), nothing)
        refused = after == wanted and again in (2, 3)  # it was killed after the rename: nothing is ever overwritten
        if (again != 0 and not refused) or content(target) != wanted:
            wrong.append(f"operation {number}: again gives {'other files' if again == 0 else f'exit {again}'}")
    return total, wrong


def two_at_once(
    fork: Callable[[list[str], Hook], int], wait: Callable[[int], int], command: Command, target: Path
) -> str:
    """Start the command twice; "" if one wrote and the other was refused, else what happened."""
    command.clear(target)
    assert wait(fork(command.words(target), nothing)) == 0
    wanted = content(target)
    command.clear(target)
    children = [fork(command.words(target), slowly), fork(command.words(target), slowly)]
    codes = sorted(wait(child) for child in children)
    expected = [0, 0] if command.name == "report" else [0, 2]
    if codes != expected:
        return f"exit codes {codes}"
    return "" if content(target) == wanted else "the files are not those of one command alone"


def two_commands_at_once(
    fork: Callable[[list[str], Hook], int], wait: Callable[[int], int], pair: tuple[Command, Command], target: Path
) -> str:
    """Start two different commands on one target; "" if the files are those of one, else what happened."""
    wanted = []
    for command in pair:
        command.clear(target)
        assert wait(fork(command.words(target), nothing)) == 0
        wanted.append(content(target))
        command.clear(target)
    codes = [wait(child) for child in [fork(command.words(target), slowly) for command in pair]]
    if sorted(codes) != [0, 2]:
        return f"exit codes {codes}"
    return "" if content(target) == wanted[codes.index(0)] else "the files are not those of one command alone"


def slowly() -> None:
    """Make renames wait, so that two commands surely meet."""
    for name in ("rename", "replace"):
        before(os, name, lambda: time.sleep(0.2))


def rows(
    start: Start, fork: Any, wait: Any, run: Path, place: Path, only: Sequence[str] = ()
) -> Iterator[tuple[str, str, str, bool]]:
    """Yield fault, promise, outcome and whether it was kept, command by command."""
    for command in commands(run):
        if only and not any(words in command.name for words in only):
            continue
        target = run if command.name == "report" else place / "written"
        total, wrong = killed_at_every_operation(start, command, target)
        outcome = f"{total} operations: " + (
            "; ".join(wrong[:3]) if wrong else "absent or whole, and the same when repeated"
        )
        yield (
            f"{command.name}, kill -9 before each file operation",
            "absent or whole; repeated: the same",
            outcome,
            not wrong,
        )
        trouble = two_at_once(fork, wait, command, target)
        promise = "both write whole files" if command.name == "report" else "one writes, the other ends with 2"
        yield f"{command.name}, twice at once", promise, trouble or "as promised", not trouble
        command.clear(target)
    if not only or "pair" in only:
        combine, export = (one for one in commands(run) if one.name.startswith(("adapter combine", "export --to peft")))
        trouble = two_commands_at_once(fork, wait, (combine, export), place / "written")
        promise = "one writes, the other ends with 2"
        yield "adapter combine and export to one target", promise, trouble or "as promised", not trouble
