"""Checkpoints for resuming: whole or absent, hashed, and free of pickle.

A checkpoint is written under a `.partial` name, every file flushed to disk and listed with its sha256 in a manifest,
and only then renamed; the pointer `latest` moves last. A kill at any moment leaves older checkpoints as they were.
Reading starts from the newest and walks back to one whose every hash agrees; the pointer only serves to notice that the
one last saved is gone altogether.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import log
from finetune.errors import InputError, MachineError
from finetune.train.checkpoint_files import (
    ADAPTER,
    MANIFEST,
    OPTIMIZER,
    STATE,
    checkpoint_path,
    fault_in,
    flush_and_digest,
    flush_directory,
    latest_step,
    list_checkpoints,
    point_at,
)

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
    staging = target.with_name(target.name + ".partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not target.is_dir() or fault_in(target) is not None:
            _check_space(directory, checkpoint)
            _write(staging, checkpoint)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(staging, target)
            flush_directory(directory)
        point_at(directory, step)
    except (OSError, SafetensorError) as error:  # a full disk reaches us as either
        shutil.rmtree(staging, ignore_errors=True)
        raise MachineError(
            f"cannot save a checkpoint in {directory}: {error}",
            fix="free disk space or choose another output_dir, then resume; older checkpoints are untouched",
        ) from error
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
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    save_file(checkpoint.adapter, staging / ADAPTER)
    save_file(checkpoint.optimizer, staging / OPTIMIZER)
    (staging / STATE).write_text(json.dumps(checkpoint.state, indent=1) + "\n")
    files = {path.name: flush_and_digest(path) for path in sorted(staging.iterdir())}
    (staging / MANIFEST).write_text(json.dumps({"algorithm": "sha256", "files": files}, indent=1) + "\n")
    flush_and_digest(staging / MANIFEST)
    flush_directory(staging)


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
