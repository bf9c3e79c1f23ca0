"""Checkpoints are complete or not used: saving, loading and pruning under damage, kills and full disks."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import InputError, MachineError
from finetune.train.checkpoint import (
    Checkpoint,
    checkpoint_path,
    fault_in,
    latest_step,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    prune_checkpoints,
    remove_after,
    save_checkpoint,
)

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
SOURCES = Path(__file__).parents[2] / "finetune"


def checkpoint(step: int, size: int = 64) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    adapter = {"a": torch.randn(size, 8, generator=generator), "b": torch.zeros(3)}
    optimizer = {"a/exp_avg": torch.randn(size, 8, generator=generator), "a/step": torch.tensor(float(step))}
    return Checkpoint(adapter, optimizer, {"loop": {"step": step, "seconds": 0.1 * step}, "best": None})


def assert_is(found: Checkpoint, step: int, size: int = 64) -> None:
    expected = checkpoint(step, size)
    assert found.state == expected.state
    for mine, theirs in ((found.adapter, expected.adapter), (found.optimizer, expected.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, checkpoint(step))
    return tmp_path


def steps_in(directory: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(directory)]


def flip_bit(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


# ---- saving and loading ---------------------------------------------------------------------------------------------


def test_saved_checkpoint_loads_unchanged(saved: Path) -> None:
    step, found = load_newest(saved)
    assert step == 3
    assert_is(found, 3)
    assert_is(load_checkpoint(checkpoint_path(saved, 2)), 2)
    assert sorted(path.name for path in checkpoint_path(saved, 1).iterdir()) == sorted(FILES)
    assert not list(saved.glob("*.partial"))


def test_a_checkpoint_before_the_first_step_has_no_optimiser_state(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 0, Checkpoint({"a": torch.ones(2)}, {}, {}))
    step, found = load_newest(tmp_path)
    assert (step, found.optimizer) == (0, {})


def test_a_whole_checkpoint_is_not_replaced_and_a_damaged_one_is(saved: Path) -> None:
    target = checkpoint_path(saved, 3)
    inode = target.stat().st_ino
    save_checkpoint(saved, 3, checkpoint(99))
    assert target.stat().st_ino == inode
    assert_is(load_checkpoint(target), 3)
    flip_bit(target / "adapter.safetensors", -1)
    save_checkpoint(saved, 3, checkpoint(3))
    assert_is(load_checkpoint(target), 3)


def test_an_empty_directory_has_no_checkpoint(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="no whole checkpoint"):
            load_newest(directory)


# ---- damage ---------------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_first(path: Path) -> None:
    flip_bit(path, 0)


def flip_middle(path: Path) -> None:
    flip_bit(path, path.stat().st_size // 2)


def flip_last(path: Path) -> None:
    flip_bit(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [remove, truncate, empty, flip_first, flip_middle, flip_last])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_detected_and_logged(
    saved: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None]
) -> None:
    path = checkpoint_path(saved, 3)
    # A manifest that only lost its final newline says the same as before; cut into its brackets instead.
    if name == "manifest.json" and damage is truncate:
        truncate(path / name)
    damage(path / name)
    fault = fault_in(path)
    assert fault is not None and (name in fault or name == "manifest.json")
    step, found = load_newest(saved)
    assert step == 2
    assert_is(found, 2)
    said = capsys.readouterr().err
    assert "step-00000003 is damaged" in said and fault in said
    with pytest.raises(InputError, match="step-00000003 is damaged"):
        load_checkpoint(path)


def test_every_flipped_bit_of_a_manifest_is_harmless_or_detected(tmp_path: Path) -> None:
    """A manifest with a flipped bit that still passes lists exactly the written files."""
    manifest = save_checkpoint(tmp_path, 1, checkpoint(1)) / "manifest.json"
    content = manifest.read_bytes()
    files = json.loads(content)["files"]
    found = 0
    for byte in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[byte] ^= 1 << bit
            manifest.write_bytes(flipped)
            if fault_in(manifest.parent) is None:
                assert json.loads(bytes(flipped))["files"] == files
            else:
                found += 1
    assert found > 0.9 * 8 * len(content)


def test_a_manifest_without_files_is_damaged(saved: Path) -> None:
    path = checkpoint_path(saved, 3)
    for files in ({}, [], None, {"state.json": "0"}):
        (path / "manifest.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))
        assert fault_in(path) is not None


def test_a_missing_newest_checkpoint_is_logged(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(checkpoint_path(saved, 3))
    assert load_newest(saved)[0] == 2
    assert "step-00000003, the last that was saved, is gone" in capsys.readouterr().err
    save_checkpoint(saved, 3, checkpoint(3))
    assert load_newest(saved)[0] == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"step-3", b"../../etc", b"\xff\xfe"])
def test_a_damaged_latest_file_is_ignored(saved: Path, content: bytes) -> None:
    (saved / "latest").write_bytes(content)
    assert load_newest(saved)[0] == 3
    save_checkpoint(saved, 4, checkpoint(4))
    assert latest_step(saved) == 4


def test_all_checkpoints_damaged(saved: Path) -> None:
    for step in (1, 2, 3):
        flip_bit(checkpoint_path(saved, step) / "optimizer.safetensors", -1)
    with pytest.raises(InputError, match="no whole checkpoint"):
        load_newest(saved)


# ---- left-overs and pruning -----------------------------------------------------------------------------------------


def test_partial_left_overs_are_not_checkpoints_and_are_removed(saved: Path) -> None:
    shutil.copytree(checkpoint_path(saved, 3), saved / "step-00000009.partial")
    assert steps_in(saved) == [1, 2, 3]
    assert load_newest(saved)[0] == 3
    prune_checkpoints(saved, keep=2, best_step=None)
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_pruning_keeps_the_best_and_the_newest(saved: Path) -> None:
    for step in (4, 5):
        save_checkpoint(saved, step, checkpoint(step))
    prune_checkpoints(saved, keep=2, best_step=2)
    assert steps_in(saved) == [2, 4, 5]
    prune_checkpoints(saved, keep=1, best_step=5)
    assert steps_in(saved) == [5]


def test_resuming_from_an_older_checkpoint_removes_the_damaged_newer_one(saved: Path) -> None:
    flip_bit(checkpoint_path(saved, 3) / "adapter.safetensors", -1)
    step, _ = load_newest(saved)
    remove_after(saved, step)
    assert steps_in(saved) == [1, 2] and latest_step(saved) == 2
    prune_checkpoints(saved, keep=1, best_step=None)
    assert load_newest(saved)[0] == 2


# ---- kill and full disk ---------------------------------------------------------------------------------------------

SAVES_IN_A_LOOP = """
import itertools, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_checkpoints import checkpoint
from finetune.train.checkpoint import prune_checkpoints
from finetune.train.checkpoint import save_checkpoint
directory = Path(sys.argv[1])
for step in itertools.count(int(sys.argv[3])):
    save_checkpoint(directory, step, checkpoint(step, size=20_000))
    prune_checkpoints(directory, keep=1, best_step=None)
    print(step, flush=True)
"""


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(0)
    first = 1
    for _ in range(6):
        process = run_python(SAVES_IN_A_LOOP, tmp_path, Path(__file__).parent, first)
        assert process.stdout is not None
        assert int(process.stdout.readline()) == first, process.stderr
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        reported = [first, *map(int, process.communicate()[0].split())]
        step, found = load_newest(tmp_path)
        assert step in (reported[-1], reported[-1] + 1)
        assert_is(found, step, size=20_000)
        first = step + 1


class Killed(BaseException):
    """Simulated kill: no handler of the project catches it."""


@pytest.mark.parametrize("moment", range(60))
def test_a_kill_between_any_two_file_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Stop at the n-th file operation of saving step 2 and pruning step 1: one checkpoint is always complete."""
    save_checkpoint(tmp_path, 1, checkpoint(1))
    operations = 0

    def dies_in_time(operation: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal operations
            operations += 1
            if operations > moment:
                raise Killed
            return operation(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for module, names in (
            (os, ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "open")),
            (Path, ("write_text",)),
        ):
            for name in names:
                patch.setattr(module, name, dies_in_time(getattr(module, name)))
        patch.setattr("safetensors.torch.save_file", dies_in_time(save_file))
        try:
            save_checkpoint(tmp_path, 2, checkpoint(2))
            prune_checkpoints(tmp_path, keep=1, best_step=None)
        except Killed:
            pass
        else:
            assert operations <= moment
    step, found = load_newest(tmp_path)
    assert_is(found, step)
    save_checkpoint(tmp_path, 3, checkpoint(3))
    prune_checkpoints(tmp_path, keep=1, best_step=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_checkpoints import checkpoint
from finetune.errors import MachineError
from finetune.train.checkpoint import save_checkpoint
save_checkpoint(Path(sys.argv[1]), 1, checkpoint(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    save_checkpoint(Path(sys.argv[1]), 2, checkpoint(2))
except MachineError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [1000, 50])
def test_a_disk_that_fills_up_while_saving(tmp_path: Path, limit: int) -> None:
    process = run_python(FILLS_THE_DISK, tmp_path, Path(__file__).parent, limit)
    output, errors = process.communicate(timeout=60)
    assert output.startswith(f"cannot write a checkpoint to {tmp_path}"), errors
    assert "File too large" in output and "older checkpoints are untouched" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert_is(load_newest(tmp_path)[1], 1)


def test_too_little_space_is_reported_before_writing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(saved)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(MachineError, match="MiB are free"):
        save_checkpoint(saved, 4, checkpoint(4))
    assert steps_in(saved) == [1, 2, 3] and not list(saved.glob("*.partial"))


def test_a_checkpoint_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file stands here")
    with pytest.raises(MachineError, match="cannot write a checkpoint"):
        save_checkpoint(tmp_path / "checkpoints", 1, checkpoint(1))


def test_no_pickle_anywhere() -> None:
    pickled = re.compile(r"pickle\.\w|import pickle|torch\.(load|save)\(|joblib|weights_only|\.(load|save)_state\(")
    assert pickled.search("state = torch.load(path, weights_only=True)")
    found = {path.name: match[0] for path in SOURCES.rglob("*.py") if (match := pickled.search(path.read_text()))}
    assert found == {}
