"""Checkpoints for resuming: complete or absent, hashed, free of pickle, and written beside the training.

A checkpoint is written under a `.partial` name, every file flushed to disk and listed with its SHA-256 in a manifest,
and only then renamed; the pointer `latest` moves last. A kill at any moment leaves older checkpoints as they were.
Reading starts from the newest and goes back to one whose every hash agrees; the pointer only serves to notice that the
newest checkpoint is gone altogether.

Importing this module imports no torch, so that `finetune checkpoints` starts at once.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from finetune import log
from finetune.errors import InputError, MachineError
from finetune.files import flush, sha256_of, staged_directory, write_text

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
LATEST = "latest"
SPACE_FACTOR = 1.1  # file-system overhead on top of the tensors' bytes
_NAME = re.compile(r"step-(\d{8})")
_LEFT_OVER = "step-*.partial"
_NO_SPACE = "free disk space or choose another output_dir, then resume; older checkpoints are untouched"


@dataclass(frozen=True)
class Checkpoint:
    """The state of training after one step.

    Attributes:
        adapter: LoRA parameters by name, in the adapter's dtype.
        optimizer: optimiser tensors by `parameter name/state name`.
        state: counters and everything else that is plain JSON.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


# ---- in the directory -----------------------------------------------------------------------------------------------


def checkpoint_path(directory: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return directory / f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that is named as a checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def left_overs(directory: Path) -> list[Path]:
    """Unfinished checkpoints of interrupted saves; the next save removes them."""
    return sorted(directory.glob(_LEFT_OVER))


def fault_in(path: Path) -> str | None:
    """Describe the fault of a checkpoint directory; None when every file is as its manifest says."""
    try:
        files = dict(json.loads((path / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    for name in (ADAPTER, OPTIMIZER, STATE):
        if name not in files:
            return f"{MANIFEST} does not list {name}"
    for name, expected in files.items():
        if Path(name).name != name:
            return f"{MANIFEST} lists {name!r}, which is not a file's name"
        if not (path / name).is_file():
            return f"{name} is missing"
        try:
            if sha256_of(path / name) != expected:
                return f"{name} is not what was written (sha256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def latest_step(directory: Path) -> int | None:
    """The step that the pointer names: the last one saved, even if its directory is gone. None: no readable pointer."""
    try:
        match = _NAME.fullmatch((directory / LATEST).read_text().strip())
    except (OSError, ValueError):
        return None
    return int(match[1]) if match else None


def _point_at(directory: Path, step: int) -> None:
    """Let the pointer name a step."""
    write_text(directory / LATEST, checkpoint_path(directory, step).name + "\n")
    flush(directory)


def remove_after(directory: Path, step: int) -> None:
    """Remove checkpoints of later steps: after a resume from `step` they would count as newest, and are damaged."""
    _point_at(directory, step)
    for later, path in list_checkpoints(directory):
        if later > step:
            shutil.rmtree(path)


def prune_checkpoints(directory: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the `keep` newest and the best, and unfinished files of interrupted saves."""
    checkpoints = list_checkpoints(directory)
    for step, path in checkpoints[: max(0, len(checkpoints) - keep)]:
        if step != best_step:
            shutil.rmtree(path)
    for path in left_overs(directory):
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(f".{LATEST}.*.partial"):
        path.unlink(missing_ok=True)


# ---- saving and loading ---------------------------------------------------------------------------------------------


def save_checkpoint(directory: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint. A complete one of the same step stays: replacing it would need a moment without it.

    Raises:
        MachineError: not enough free disk, or the disk filled up while writing; no unfinished file stays.
    """
    target = checkpoint_path(directory, step)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if fault_in(target) is not None:
            _check_space(directory, checkpoint)
            with staged_directory(target, "a checkpoint", fix=_NO_SPACE, replace=True, lock=False) as staging:
                _write_files(staging, checkpoint)
        _point_at(directory, step)
    except OSError as error:
        raise MachineError(f"cannot write a checkpoint to {directory}: {error}", fix=_NO_SPACE) from error
    return target


def _write_files(staging: Path, checkpoint: Checkpoint) -> None:
    """Write all files, each on disk before the manifest with its hash."""
    from safetensors.torch import save_file

    save_file(checkpoint.adapter, staging / ADAPTER)
    save_file(checkpoint.optimizer, staging / OPTIMIZER)
    (staging / STATE).write_text(json.dumps(checkpoint.state, indent=1) + "\n")
    files = {}
    for path in sorted(staging.iterdir()):
        flush(path)
        files[path.name] = sha256_of(path)
    (staging / MANIFEST).write_text(json.dumps({"algorithm": "sha256", "files": files}, indent=1) + "\n")


def load_newest(directory: Path) -> tuple[int, Checkpoint]:
    """Read the newest complete checkpoint; damaged or missing ones on the way are logged.

    Raises:
        InputError: there is none.
    """
    found = list_checkpoints(directory)
    last = latest_step(directory)
    if last is not None and last not in dict(found):
        log.warning(f"checkpoint {checkpoint_path(directory, last).name}, the last that was saved, is gone")
    for step, path in reversed(found):
        fault = fault_in(path)
        if fault is None:
            return step, _read(path)
        log.warning(f"checkpoint {path.name} is damaged ({fault}); going back to the one before")
    raise InputError(f"no whole checkpoint in {directory}", fix="start the run again")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        InputError: it is missing or damaged.
    """
    if fault := fault_in(path):
        raise InputError(f"checkpoint {path} is damaged", why=fault)
    return _read(path)


def _read(path: Path) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = STATE
    try:
        state = json.loads((path / STATE).read_text())
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} holds a JSON {type(state).__name__}")
        name = ADAPTER
        adapter = load_file(path / ADAPTER)
        name = OPTIMIZER
        return Checkpoint(adapter, load_file(path / OPTIMIZER), state)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        why = f"the hashes agree, so it is not damaged: something else wrote it ({error})"
        raise InputError(f"{path / name} is not a checkpoint's file", why=why) from error


def _check_space(directory: Path, checkpoint: Checkpoint) -> None:
    needed = sum(map(_total_bytes, (checkpoint.adapter, checkpoint.optimizer))) * SPACE_FACTOR
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise MachineError(
            f"a checkpoint needs {needed / 2**20:,.1f} MiB in {directory}, {free / 2**20:,.1f} MiB are free",
            fix="free disk space, lower save.keep, or choose another output_dir",
        )


def _total_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# ---- beside the training --------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, in the order asked for, into one directory.

    Hashing, flushing to disk and pruning happen in the thread, so that a step waits for a copy in host memory only; a
    save that comes while the one before is still being written waits for it. An error in the thread is raised by the
    next call of any method, and at the latest at the end of the `with` block. The end of the block always waits: a run
    that reports "everything is saved" has it on disk.

    Args:
        directory: of the run's checkpoints.
        keep: how many of the newest stay (`save.keep`).
        background: False: `save` returns when the checkpoint is on disk.
    """

    def __init__(self, directory: Path, keep: int, *, background: bool) -> None:
        self.directory, self.keep, self.background = directory, keep, background
        self._thread: threading.Thread | None = None
        self._step = 0
        self._failure: BaseException | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None and self._thread.is_alive() and error is not None:
            log.info(f"waiting for the checkpoint of step {self._step}")
        if error is None:
            self.wait()
            return
        try:
            self.wait()
        except Exception as failure:  # what ended the run matters more
            log.warning(f"the checkpoint of step {self._step} was not saved: {failure}")

    def save(self, step: int, checkpoint: Checkpoint, best_step: int | None) -> None:
        """Save a checkpoint and remove the ones no longer kept.

        Args:
            step: of the checkpoint.
            checkpoint: on the CPU; nothing may change it until it is written.
            best_step: stays beside the newest; None: no other does.

        Raises:
            MachineError: this write (without `background`), or the one before, failed.
        """
        self.wait()
        if not self.background:
            self._write(step, checkpoint, best_step)
            return
        self._step = step
        # Without `daemon` a third Ctrl-C would wait too; killing the thread is as harmless as killing the process.
        self._thread = threading.Thread(target=self._write_in_thread, args=(step, checkpoint, best_step), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a finished write, without waiting for one that is under way.

        Raises:
            MachineError: the write failed.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until everything asked for is on disk.

        Raises:
            MachineError: the write failed.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write_in_thread(self, step: int, checkpoint: Checkpoint, best_step: int | None) -> None:
        try:
            self._write(step, checkpoint, best_step)
        except BaseException as failure:  # raised again by `wait`
            self._failure = failure

    def _write(self, step: int, checkpoint: Checkpoint, best_step: int | None) -> None:
        save_checkpoint(self.directory, step, checkpoint)
        prune_checkpoints(self.directory, self.keep, best_step)
