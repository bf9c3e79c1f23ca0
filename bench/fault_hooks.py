"""Faults, applied to a child process before it runs, or to its files afterwards.

A hook replaces functions in a forked process that ends with the run, so nothing has to be restored.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from finetune.evaluate import likelihood
from finetune.train import checkpoint, metrics, trainer
from finetune.train import run as run_module
from finetune.train.metrics import MetricsLog

STEPS = 6
Hook = Callable[[], None]


class Place(Enum):
    """A phase of a run."""

    START_UP = "start-up"
    BEFORE = "evaluation before training"
    STEP = "step"
    VALIDATION = "validation"
    SAVE = "save"
    AFTER = "evaluation after training"


def nothing() -> None:
    """No fault."""


def signal_in(place: Place, number: int) -> Hook:
    """Send the process a signal when it is in a phase."""

    def send() -> None:
        os.kill(os.getpid(), number)

    def hook() -> None:
        match place:
            case Place.START_UP:
                before(run_module, "open_session", send)
            case Place.STEP:
                append = MetricsLog.append

                def append_and_send(self: MetricsLog, kind: str, step: int, **figures: Any) -> None:
                    append(self, kind, step, **figures)
                    if (kind, step) == ("step", STEPS - 1):
                        send()

                setattr(MetricsLog, "append", append_and_send)  # noqa: B010
            case Place.SAVE:
                before(checkpoint, "save_checkpoint", send)
            case Place.VALIDATION:
                before(trainer, "held_out_loss", lambda: before(likelihood, "collate", send))
            case Place.BEFORE:
                before(run_module, "measure_test_set", send)
            case Place.AFTER:
                before(run_module, "check_unchanged", send)

    return hook


def between_file_operations(number: int) -> Hook:
    """kill -9 before the n-th file operation of all saves."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done > number and in_save:
            os.kill(os.getpid(), signal.SIGKILL)

    in_save = False

    def hook() -> None:
        save = checkpoint.save_checkpoint
        prune = checkpoint.prune_checkpoints

        def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal in_save
                in_save = True
                try:
                    return operation(*args, **kwargs)
                finally:
                    in_save = False

            return run

        setattr(checkpoint, "save_checkpoint", watched(save))  # noqa: B010
        setattr(checkpoint, "prune_checkpoints", watched(prune))  # noqa: B010
        for module, names in (
            (os, ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")),
            (safetensors.torch, ("save_file",)),
        ):
            for name in names:
                before(module, name, lambda: count() if in_save else None)

    return hook


def full_disk() -> Hook:
    """A file-size limit below the optimiser's file, from the first checkpoint on."""

    def hook() -> None:
        prune = checkpoint.prune_checkpoints

        def prune_and_limit(directory: Path, keep: int, best: int | None) -> None:
            prune(directory, keep, best)
            size = max(file.stat().st_size for file in directory.glob("step-*/*"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))

        setattr(checkpoint, "prune_checkpoints", prune_and_limit)  # noqa: B010

    return hook


def poison_after(step: int) -> Hook:
    """Make one number of one parameter NaN after a step."""

    def hook() -> None:
        count = trainer.Trainer._record

        def count_and_poison(self: trainer.Trainer, *args: Any) -> None:
            count(self, *args)
            if self.state.step == step:
                with torch.no_grad():
                    next(iter(self.adapter.parameters().values())).view(-1)[0] = torch.nan

        setattr(trainer.Trainer, "_record", count_and_poison)  # noqa: B010

    return hook


def tracker_down_after(step: int) -> Hook:
    """A tracker that stops responding: Accelerate's calls raise as they do without a network."""

    def hook() -> None:
        def log(_self: Any, _figures: Any, step: int = 0) -> None:
            if step >= at:
                raise ConnectionError("no route to the tracker")

        at = step
        accelerator = metrics.Accelerator
        for name, stand_in in (("log", log), ("init_trackers", lambda *_, **__: None)):
            setattr(accelerator, name, stand_in)

    return hook


def before(module: Any, name: str, act: Callable[[], object]) -> None:
    """Call something before a module's function."""
    function = getattr(module, name)

    def acted(*args: Any, **kwargs: Any) -> Any:
        act()
        return function(*args, **kwargs)

    setattr(module, name, acted)


def truncate(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "with a flipped bit": flip, "missing": Path.unlink}


def small_disk_bytes(run: Path) -> int:
    """Size of a disk with room for one checkpoint but not two, beside a run's other files."""
    total = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    newest = max((run / "checkpoints").glob("step-*"))
    one = sum(file.stat().st_size for file in newest.iterdir())
    others = total - sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    return others + one + one // 2


@contextmanager
def mounted(place: Path, size: int) -> Iterator[bool]:
    """A small file system in memory; False where this process may not mount one."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(place)], check=True)


@contextmanager
def remounted_read_only(place: Path) -> Iterator[None]:
    """Remount a file system read-only, for every user."""
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
