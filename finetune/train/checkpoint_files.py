"""What lies in a checkpoint directory and whether it is whole: names, hashes and the pointer, without reading a tensor.

Free of torch, so that `finetune checkpoints` answers at once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from finetune.digest import sha256_of
from finetune.train.run_directory import write_whole

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
    write_whole(directory / LATEST, checkpoint_path(directory, step).name + "\n")
    flush_directory(directory)


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
    """A file's sha256, once it is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def flush_directory(directory: Path) -> None:
    """Put a directory's entries on disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
