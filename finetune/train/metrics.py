"""Where figures go while training: a line a step in metrics.jsonl, a progress line, and a tracker if there is one."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from finetune.config.schema import LoggingConfig
from finetune.console import warn
from finetune.train.run_directory import write_whole

GIB = 2**30


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class MetricsLog:
    """Append-only metrics.jsonl: each line is one JSON object with `kind` (such as `step`) and `step`.

    Args:
        path: the file.
        writes: False in a process that leaves it to another.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def append(self, kind: str, step: int, **figures: Any) -> None:
        """Write one line."""
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")

    def cut_after(self, step: int) -> None:
        """Drop lines of later steps (and a half-written last line): a resumed run writes them again."""
        if not self.writes or not self.path.exists():
            return
        lines = self.path.read_text(errors="replace").splitlines()
        write_whole(self.path, "".join(line + "\n" for line in lines if _step_of(line) <= step))

    def losses(self) -> list[float]:
        """Losses of the steps in the log, oldest first; none in a process that leaves the log to another."""
        if not self.writes or not self.path.exists():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [float(line["loss"]) for line in lines if line["kind"] == "step"]


def _step_of(line: str) -> float:
    """The step of a line, infinity if the line is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Tracker:
    """Sends figures to a tracker through Accelerate; its first failure is reported and ends tracking, never the run.

    Args:
        accelerator: created with the tracker's name.
        config: which tracker, project and mode.
        run_config: plain configuration to show beside the figures; it holds no secrets (recipes refuse them).
        directory: where offline files go.
    """

    def __init__(
        self, accelerator: Accelerator, config: LoggingConfig, run_config: dict[str, Any], directory: Path
    ) -> None:
        self._accelerator, self._active, self._name = accelerator, False, config.tracker
        if config.tracker == "none":
            return
        if importlib.util.find_spec(config.tracker) is None:  # Accelerate would go on without a word
            warn(f"tracking is off: {config.tracker} is not installed (pip install {config.tracker})")
            return
        # An unreachable wandb otherwise blocks for over two minutes before it gives up.
        options = {"mode": config.mode, "dir": str(directory), "name": directory.name, "settings": {"init_timeout": 20}}
        self._active = True
        self._try(accelerator.init_trackers, config.project, config=run_config, init_kwargs={config.tracker: options})

    def log(self, figures: dict[str, float], step: int) -> None:
        """Send figures of a step."""
        self._try(self._accelerator.log, figures, step=step)

    def log_image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Send an image, grey [rows, columns], to a tracker that takes images."""
        if self._active:
            tracker = self._accelerator.get_tracker(self._name)
            self._try(tracker.log_images, {name: [pixels]}, step=step)

    def close(self) -> None:
        """Finish; waits for what is still being sent."""
        self._try(self._accelerator.end_training)

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> None:
        if not self._active:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # a tracker may fail in any way; none of them is worth a run
            self._active = False
            warn(f"tracking is off from here on: {type(error).__name__}: {error}")
