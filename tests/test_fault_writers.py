"""A small part of the fault matrix: a command killed before every file operation and twice at once; its controls."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from finetune.cli.main import main
from finetune.errors import FinetuneError
from finetune.files import PARTIAL, staged_directory

Write = Callable[[Path], None]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import fault_writers

    return fault_writers


def fork(operation: Callable[[], int | None], hook: Callable[[], None]) -> int:
    """Start a process whose output is thrown away; its number."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            hook()
            code = operation() or 0
        except FinetuneError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_an_import_is_whole_or_absent_wherever_it_is_killed(faults: ModuleType, tmp_path: Path) -> None:
    source = Path(__file__).parent / "fixtures" / "peft-0.19.0"
    words = ["adapter", "import", str(source), "--out", str(tmp_path / "out")]
    command = faults.Command("adapter import", lambda _: words, faults.remove)
    assert main(words) == 0  # children share what it has imported

    def start(words: list[str], hook: Callable[[], None]) -> int:
        return fork(lambda: main(words), hook)

    total, wrong = faults.killed_at_every_operation(lambda *given: wait(start(*given)), command, tmp_path / "out")
    assert total >= 5 and wrong == []
    assert faults.two_at_once(start, wait, command, tmp_path / "out") == ""


def in_place(target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in "ab":
        (target / name).write_text(name)
        os.fsync(os.open(target / name, os.O_RDONLY))


def leftovers_refused(target: Path) -> None:
    partial = target.with_name(target.name + PARTIAL)
    partial.mkdir()
    (partial / "a").write_text("a")
    partial.rename(target)


def staged(target: Path) -> None:
    with staged_directory(target) as staging:
        (staging / "a").write_text("a")


@pytest.mark.parametrize(
    ("write", "wrong"),
    [(staged, ""), (in_place, "half of the files have their final names"), (leftovers_refused, "again gives exit")],
)
def test_wrong_writers_are_found(write: Write, wrong: str, faults: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = faults.Command("writer", lambda _: [], faults.remove)
    start = lambda _, hook: wait(fork(lambda: write(target), hook))  # noqa: E731
    found = faults.killed_at_every_operation(start, command, target)[1]
    assert (wrong in found[0]) if wrong else found == []
