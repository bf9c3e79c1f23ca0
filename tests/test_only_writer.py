"""Two commands that write one target: the second is told who writes; a killed writer leaves nothing in the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.errors import ConfigError
from finetune.files import PARTIAL, only_writer, staged_directory, write_text

HOLD = """
import sys, time
from pathlib import Path
from finetune.files import staged_directory
with staged_directory(Path(sys.argv[1])) as staging:
    (staging / "half").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing `out`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_the_second_writer_is_told_who_the_first_is(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=f"by process {writer.pid} on ") as error, only_writer(out):
        pass
    assert error.value.exit_code == 2
    assert (tmp_path / f"out{PARTIAL}" / "half").exists(), "the first one's files are untouched"
    writer.communicate("", timeout=30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "no lock and nothing unfinished stays"


def test_a_killed_writer_neither_blocks_nor_leaves_its_files(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait(30)
    assert (tmp_path / f"out{PARTIAL}" / "half").exists() and not (tmp_path / "out").exists()
    with staged_directory(tmp_path / "out") as staging:
        assert list(staging.iterdir()) == []
        (staging / "whole").write_text("whole")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_block_may_be_entered_again_and_ends_with_the_outer_one(tmp_path: Path) -> None:
    with only_writer(tmp_path / "out"):
        with only_writer(tmp_path / "out"), staged_directory(tmp_path / "out"):
            pass
        assert (tmp_path / ".out.lock").exists()
    assert not (tmp_path / ".out.lock").exists()
    with pytest.raises(RuntimeError, match="inside"), only_writer(tmp_path / "out"):
        raise RuntimeError("inside")
    with only_writer(tmp_path / "out"):
        pass


def test_unfinished_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    dead, alive = (tmp_path / f".report.html.{pid}{PARTIAL}" for pid in (int(done.stdout), os.getppid()))
    dead.write_text("half")
    alive.write_text("half")
    write_text(tmp_path / "report.html", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "report.html"]


@pytest.mark.parametrize("target", ["base", "adapter"])
def test_commands_end_with_2_while_another_writes(
    target: str, writer: subprocess.Popen[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if target == "base":
        words = ["base", "tiny", str(tmp_path / "out")]
    else:
        source = Path(__file__).parent / "fixtures" / "peft-0.19.0"
        words = ["adapter", "import", str(source), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"being written by process {writer.pid}" in capfd.readouterr().err
