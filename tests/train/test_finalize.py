"""The end of a run: an adapter has its name only when it is verified; full disks; a directory that goes away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_run import Train, manifest_of

from finetune.adapters import read_back as read_back_module
from finetune.cli.main import main
from finetune.errors import CheckError, MachineError
from finetune.train import finalize, trainer

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_STEP = ("trainer.max_steps=1", "evaluate.every_steps=99", "export.read_back=always")


def export(*words: object) -> int:
    return main(["export", *map(str, words), "--to", "peft"])


def test_an_adapter_whose_read_back_failed_is_not_taken_for_the_runs(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise CheckError("read back by stock PEFT is not the model that was trained", fix="do not serve it")

    with monkeypatch.context() as patched:
        patched.setattr(finalize, "read_back", fails)
        code, run = train(*ONE_STEP, name="failed")
    assert code == 6 and manifest_of(run)["status"] == "stopped"
    assert not (run / "adapter").exists() and (run / "adapter_unverified" / "adapter_config.json").is_file()
    capfd.readouterr()
    assert export(run, "--out", tmp_path / "out") == 3
    assert "has not passed its read-back" in capfd.readouterr().err
    assert export(run / "adapter_unverified", "--out", tmp_path / "out") == 3
    assert "--unfinished exports it as it is" in capfd.readouterr().err and not (tmp_path / "out").exists()
    assert export(run / "adapter_unverified", "--out", tmp_path / "out", "--unfinished") == 0
    assert "is not finished: it has not passed" in capfd.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "adapter").is_dir() and not (run / "adapter_unverified").exists(), "a read-back that passes names it"
    capfd.readouterr()
    assert export(run, "--out", tmp_path / "finished") == 0
    assert "not finished" not in capfd.readouterr().err


@pytest.mark.parametrize("wanted", ["auto", "always"])
def test_full_temporary_space_at_the_read_back(
    wanted: str, train: Train, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(read_back_module, "save_file", full)
    monkeypatch.setattr(finalize, "fits_in_memory", lambda _: True)
    code, run = train(*ONE_STEP[:2], f"export.read_back={wanted}", name=f"full-{wanted}")
    errors = capfd.readouterr().err
    assert "No space left on device" in errors and "bug" not in errors
    if wanted == "auto":
        assert code == 0 and (run / "adapter").is_dir()
        assert "temporary files cannot be written" in manifest_of(run)["read_back"]["skipped"]
    else:
        assert code == 5 and (run / "adapter_unverified").is_dir() and "set TMPDIR" in errors


@pytest.mark.parametrize("fate", ["moved", "removed"])
def test_a_run_whose_directory_goes_away_ends_with_a_message(
    fate: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = trainer.Trainer._make_step
    runs: list[Path] = []

    def step(self: trainer.Trainer, progress: object) -> None:
        original(self, progress)  # type: ignore[arg-type]
        if not runs:
            runs.append(self.run.path)
            if fate == "moved":
                self.run.path.rename(tmp_path / "elsewhere")
            else:
                shutil.rmtree(self.run.path)

    monkeypatch.setattr(trainer.Trainer, "_make_step", step)
    code, run = train("trainer.max_steps=3", "evaluate.every_steps=99", name="gone")
    errors = capfd.readouterr().err
    assert code == 5 and "was moved or removed while the run was going on" in errors and "bug" not in errors
    assert not (run / "manifest.json").exists(), "nothing is written under the old name"


def test_a_check_ends_when_its_command_is_killed(tmp_path: Path) -> None:
    """The child of a killed process would otherwise go on reading 40 GB."""
    script = tmp_path / "slow.py"
    script.write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(120)\n"
    )
    program = (
        "from pathlib import Path; from finetune.adapters.read_back import run_child; "
        f"run_child(Path({str(script)!r}), {{}}, 'failed')"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as parent:
        child = wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


def wait_for(condition: Callable[[], object], seconds: float = 60) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail("it did not happen")


def test_other_errors_of_temporary_files_keep_their_kind() -> None:
    with pytest.raises(ValueError, match="mine"), read_back_module.scratch_directory():
        raise ValueError("mine")

    @contextmanager
    def nested():  # type: ignore[no-untyped-def]
        with read_back_module.scratch_directory() as scratch:
            yield scratch

    with pytest.raises(MachineError, match="killed"), nested():
        raise MachineError("killed")
