"""Checkpoints for resuming: whole or absent, hashed, and free of pickle.

A checkpoint is written under a `.partial` name, every file flushed to disk and listed with its sha256 in a manifest,
and only then renamed; a kill at any moment leaves older checkpoints as they were. Reading starts from the newest and
walks back to one whose every hash agrees.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.console import warn
from finetune.errors import InputError, MachineError

MANIFEST = "manifest.json"
ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
NAME = re.compile(r"step-(\d{8})$")
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


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return directory / f"step-{step:08d}"


def save_checkpoint(directory: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint. A whole one of the same step stays as it is: replacing it would need a moment without it.

    Raises:
        MachineError: not enough free disk, or the disk filled up while writing; nothing half-written stays.
    """
    target = checkpoint_path(directory, step)
    if target.is_dir() and fault_in(target) is None:
        return target
    staging = target.with_name(target.name + ".partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _check_space(directory, checkpoint)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save_file(checkpoint.adapter, staging / ADAPTER)
        save_file(checkpoint.optimizer, staging / OPTIMIZER)
        (staging / STATE).write_text(json.dumps(checkpoint.state, indent=1) + "\n")
        files = {path.name: _digest_and_flush(path) for path in sorted(staging.iterdir())}
        (staging / MANIFEST).write_text(json.dumps({"algorithm": "sha256", "files": files}, indent=1) + "\n")
        _digest_and_flush(staging / MANIFEST)
        _flush_directory(staging)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(staging, target)
        _flush_directory(directory)
    except (OSError, SafetensorError) as error:  # a full disk reaches us as either
        shutil.rmtree(staging, ignore_errors=True)
        raise MachineError(
            f"cannot save a checkpoint in {directory}: {error}",
            fix="free disk space or choose another output_dir, then resume; older checkpoints are untouched",
        ) from error
    return target


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that is named as a checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := NAME.match(path.name))]
    return sorted(found)


def fault_in(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None when every file is as its manifest says."""
    try:
        files = dict(json.loads((path / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name in (ADAPTER, OPTIMIZER, STATE):
        if name not in files:
            return f"{MANIFEST} does not list {name}"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} is not what was written (sha256 differs)"
    return None


def load_newest(directory: Path) -> tuple[int, Checkpoint]:
    """The newest whole checkpoint; damaged ones on the way are named.

    Raises:
        InputError: there is none.
    """
    for step, path in reversed(list_checkpoints(directory)):
        fault = fault_in(path)
        if fault is None:
            return step, _read(path)
        warn(f"checkpoint {path.name} is damaged ({fault}); going back to the one before")
    raise InputError(f"no whole checkpoint in {directory}", fix="start the run again")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one certain checkpoint.

    Raises:
        InputError: it is missing or damaged.
    """
    if fault := fault_in(path):
        raise InputError(f"checkpoint {path} is damaged", why=fault)
    return _read(path)


def remove_after(directory: Path, step: int) -> None:
    """Remove checkpoints of later steps: after going back to `step` they count as newest, and are damaged."""
    for later, path in list_checkpoints(directory):
        if later > step:
            shutil.rmtree(path)


def prune_checkpoints(directory: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the `keep` newest and the best, and what interrupted saves left behind."""
    checkpoints = list_checkpoints(directory)
    for step, path in checkpoints[: max(0, len(checkpoints) - keep)]:
        if step != best_step:
            shutil.rmtree(path)
    for leftover in directory.glob("step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / STATE).read_text())
    return Checkpoint(load_file(path / ADAPTER), load_file(path / OPTIMIZER), state)


def _check_space(directory: Path, checkpoint: Checkpoint) -> None:
    needed = sum(map(_total_bytes, (checkpoint.adapter, checkpoint.optimizer))) * SPACE_FACTOR
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise MachineError(
            f"a checkpoint needs {needed / 2**30:.2f} GiB in {directory}, {free / 2**30:.2f} GiB are free",
            fix="free disk space, lower save.keep, or choose another output_dir",
        )


def _total_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_and_flush(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
