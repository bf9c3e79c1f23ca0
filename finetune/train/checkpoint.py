"""What lies in a checkpoint directory and whether it is whole: names, hashes and the pointer, without reading a tensor.

Free of torch, so that `finetune checkpoints` answers at once.
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
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import log
from finetune.errors import InputError, MachineError
from finetune.files import flush, sha256_of, staged_directory, write_text

MANIFEST = "manifest.json"
ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
LATEST = "latest"
NAME = re.compile(r"step-(\d{8})")
LEFT_OVER = "step-*.partial"


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return directory / f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that is named as a checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := NAME.fullmatch(path.name))]
    return sorted(found)


def left_overs(directory: Path) -> list[Path]:
    """What saves that were cut short left behind; the next save removes it."""
    return sorted(directory.glob(LEFT_OVER))


def fault_in(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None when every file is as its manifest says."""
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
        match = NAME.fullmatch((directory / LATEST).read_text().strip())
    except (OSError, ValueError):
        return None
    return int(match[1]) if match else None


def point_at(directory: Path, step: int) -> None:
    """Let the pointer name a step, in one step."""
    write_text(directory / LATEST, checkpoint_path(directory, step).name + "\n")
    flush(directory)


def remove_after(directory: Path, step: int) -> None:
    """Remove checkpoints of later steps: after going back to `step` they count as newest, and are damaged."""
    point_at(directory, step)
    for later, path in list_checkpoints(directory):
        if later > step:
            shutil.rmtree(path)


def prune_checkpoints(directory: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the `keep` newest and the best, and what interrupted saves left behind."""
    checkpoints = list_checkpoints(directory)
    for step, path in checkpoints[: max(0, len(checkpoints) - keep)]:
        if step != best_step:
            shutil.rmtree(path)
    for path in left_overs(directory):
        shutil.rmtree(path, ignore_errors=True)


def flush_and_digest(path: Path) -> str:
    """A file's SHA-256, once it is on disk."""
    flush(path)
    return sha256_of(path)


# Checkpoints for resuming: whole or absent, hashed, and free of pickle.
#
# A checkpoint is written under a `.partial` name, every file flushed to disk and listed with its sha256 in a manifest,
# and only then renamed; the pointer `latest` moves last. A kill at any moment leaves older checkpoints as they were.
# Reading starts from the newest and walks back to one whose every hash agrees; the pointer only serves to notice that
# the one last saved is gone altogether.

SPACE_FACTOR = 1.1  # file-system overhead on top of the tensors' bytes


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment.

    Attributes:
        adapter: LoRA parameters by name, in the adapter's dtype.
        optimizer: optimiser tensors by `parameter name/state name`.
        state: counters and everything else that is plain JSON.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    def copy(self) -> Checkpoint:
        """The same moment in memory of its own, which later steps leave alone."""
        adapter, optimizer = (
            {name: tensor.clone() for name, tensor in tensors.items()} for tensors in (self.adapter, self.optimizer)
        )
        return Checkpoint(adapter, optimizer, json.loads(json.dumps(self.state)))


def save_checkpoint(directory: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint. A whole one of the same step stays as it is: replacing it would need a moment without it.

    Raises:
        MachineError: not enough free disk, or the disk filled up while writing; nothing half-written stays.
    """
    target = checkpoint_path(directory, step)
    fix = "free disk space or choose another output_dir, then resume; older checkpoints are untouched"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not target.is_dir() or fault_in(target) is not None:
            _check_space(directory, checkpoint)
            with staged_directory(target, "a checkpoint", fix=fix, replace=True) as staging:
                _write(staging, checkpoint)
        point_at(directory, step)
    except OSError as error:
        raise MachineError(f"cannot write a checkpoint to {directory}: {error}", fix=fix) from error
    return target


def load_newest(directory: Path) -> tuple[int, Checkpoint]:
    """The newest whole checkpoint; damaged or lost ones on the way are named.

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
    """Read one certain checkpoint.

    Raises:
        InputError: it is missing or damaged.
    """
    if fault := fault_in(path):
        raise InputError(f"checkpoint {path} is damaged", why=fault)
    return _read(path)


def _write(staging: Path, checkpoint: Checkpoint) -> None:
    """All files, on disk before the manifest that vouches for them."""
    save_file(checkpoint.adapter, staging / ADAPTER)
    save_file(checkpoint.optimizer, staging / OPTIMIZER)
    (staging / STATE).write_text(json.dumps(checkpoint.state, indent=1) + "\n")
    files = {path.name: flush_and_digest(path) for path in sorted(staging.iterdir())}
    (staging / MANIFEST).write_text(json.dumps({"algorithm": "sha256", "files": files}, indent=1) + "\n")


def _read(path: Path) -> Checkpoint:
    name = STATE
    try:
        state = json.loads((path / STATE).read_text())
        name = ADAPTER
        adapter = load_file(path / ADAPTER)
        name = OPTIMIZER
        return Checkpoint(adapter, load_file(path / OPTIMIZER), state)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        why = f"the hashes agree, so it was not damaged but written by something else: {error}"
        raise InputError(f"{path / name} is not what a checkpoint holds", why=why) from error


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


# Writes checkpoints beside the training: the loop copies what is to be saved and goes on, a thread does the rest.


class CheckpointWriter:
    """One write at a time, in the order asked for, into one directory.

    Hashing, flushing to disk and pruning happen in a thread, so that a step waits for a copy in host memory only; a
    save that comes while the one before is still being written waits for it. What goes wrong in the thread is raised
    by the next call of any method, and at the latest at the end of the `with` block. Leaving the block always waits: a
    run that says "everything is saved" has it on disk.

    Args:
        directory: of the run's checkpoints.
        keep: newest ones that stay (`save.keep`).
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
        """Save a moment and remove the checkpoints no longer kept.

        Args:
            step: of the checkpoint.
            checkpoint: on the CPU; it may share memory with what is being trained.
            best_step: stays beside the newest; None: nothing does.

        Raises:
            MachineError: this write (without `background`), or the one before, failed.
        """
        self.wait()
        if not self.background:
            self._write(step, checkpoint, best_step)
            return
        self._step = step
        # Not a daemon would make a third Ctrl-C wait as well; killing the thread is as harmless as killing the process.
        self._thread = threading.Thread(
            target=self._write_and_keep_failure, args=(step, checkpoint.copy(), best_step), daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what a finished write met, without waiting for one that is under way.

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

    def _write_and_keep_failure(self, step: int, checkpoint: Checkpoint, best_step: int | None) -> None:
        try:
            self._write(step, checkpoint, best_step)
        except BaseException as failure:  # raised again where someone is listening
            self._failure = failure

    def _write(self, step: int, checkpoint: Checkpoint, best_step: int | None) -> None:
        save_checkpoint(self.directory, step, checkpoint)
        prune_checkpoints(self.directory, self.keep, best_step)
