"""Metrics of a run: metrics.jsonl, the recipe's tracker, peak memory, and detection of loss spikes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import secrets
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from numpy.typing import NDArray

from finetune import log
from finetune.config.schema import LoggingConfig
from finetune.files import write_text

GIB = 2**30


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class MetricsLog:
    """Append-only metrics.jsonl: each line is one JSON object (`kind`: step, evaluation, spike; `step`).

    Args:
        path: the file.
        writes: False on all ranks but rank 0: nothing is written.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def append(self, kind: str, step: int, **figures: Any) -> None:
        """Write one line; the figures keep their names and order."""
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")

    def cut_after(self, step: int) -> None:
        """Remove lines of later steps, and an incomplete last line: a resumed run writes them again."""
        if not self.writes or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        if bad := [number for number, line in enumerate(lines[:-1], start=1) if _step_of(line) is None]:
            log.warning(f"{self.path}: {len(bad):,} damaged lines are removed, the first is line {bad[0]}")
        kept = [line for line in lines if (found := _step_of(line)) is not None and found <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def losses(self) -> list[float]:
        """Losses of the steps in the log, oldest first."""
        if not self.path.exists():
            return []
        texts = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [json.loads(text) for text in texts if _step_of(text) is not None]
        losses = (line.get("loss") for line in lines if line["kind"] == "step")
        return [float(loss) for loss in losses if isinstance(loss, int | float)]


def _step_of(line: str) -> int | None:
    """The step of a line; None if the line is incomplete or damaged."""
    try:
        content = json.loads(line)
        return int(content["step"]) if isinstance(content["kind"], str) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


class Tracker:
    """Sends figures to a tracker through Accelerate; its first failure is reported and ends tracking, never the run.

    Only figures and the configuration are sent: no record, no text that a model wrote.

    Args:
        accelerator: only its main process sends.
        config: tracker, project and mode.
        run_config: plain configuration to show beside the figures; it holds no secrets (recipes refuse them).
        directory: the run's directory, for offline files.
    """

    def __init__(
        self, accelerator: Accelerator, config: LoggingConfig, run_config: dict[str, Any], directory: Path
    ) -> None:
        self._tracker: GeneralTracker | None = None
        if config.tracker == "none" or not accelerator.is_main_process:
            return
        if importlib.util.find_spec(config.tracker) is None:
            log.warning(f"tracking is off: {config.tracker} is not installed (pip install {config.tracker})")
            return
        self._try(self._start, config, run_config, directory)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Send figures of a step: numbers only, so that no record can be sent by mistake."""
        if self._tracker is not None:
            self._try(self._send, figures, step)

    def log_image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Send a grey image [height, width] to trackers that take images."""
        if isinstance(self._tracker, WandBTracker):
            self._try(self._tracker.log_images, {name: [pixels]}, step=step)
        elif isinstance(self._tracker, TensorBoardTracker):
            self._try(self._tracker.log_images, {name: pixels[None, :, :, None]}, step=step, dataformats="NHWC")

    def close(self) -> None:
        """Finish; waits for what is still being sent."""
        if self._tracker is not None:
            self._try(self._tracker.finish)

    def _start(self, config: LoggingConfig, run_config: dict[str, Any], directory: Path) -> None:
        tracker = make_tracker(config, directory)
        tracker.start()
        # wandb shows a tree; the others take single values only.
        tracker.store_init_configuration(run_config if config.tracker == "wandb" else flat(run_config))
        self._tracker = tracker

    def _send(self, figures: dict[str, float], step: int) -> None:
        assert self._tracker is not None
        self._tracker.log({name: float(value) for name, value in figures.items()}, step=step)

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:  # a tracker may fail in any way; no failure is worth a run
            self._tracker = None
            log.warning(f"tracking is off from here on: {type(error).__name__}: {error}")


def make_tracker(config: LoggingConfig, directory: Path) -> GeneralTracker:
    """Make Accelerate's object for a tracker and set where it writes; nothing is started.

    With `mode: offline` every file goes into the run directory, whatever servers the environment names.

    Args:
        config: tracker (not `none`), project and mode.
        directory: the run's directory.
    """
    offline = config.mode == "offline"
    if config.tracker == "wandb":
        # An unreachable wandb otherwise blocks for over two minutes before it gives up.
        settings = {"init_timeout": 20}
        return WandBTracker(
            config.project,
            mode=config.mode,
            dir=str(directory),
            name=directory.name,
            id=_wandb_id(directory),
            resume="allow",
            settings=settings,
        )
    if config.tracker == "tensorboard":
        return TensorBoardTracker("tensorboard", logging_dir=directory)
    if config.tracker == "mlflow":
        if offline:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{directory.absolute() / 'mlflow.db'}"
        artifacts = (directory / "mlflow-artifacts").absolute().as_uri() if offline else None
        return MLflowTracker(config.project, logging_dir=artifacts, run_name=directory.name)
    if offline:
        os.environ.pop("TRACKIO_SPACE_ID", None)  # a Space on the hub, which trackio would send everything to
        os.environ["TRACKIO_DIR"] = str(directory.absolute() / "trackio")
    return TrackioTracker(config.project, name=directory.name)


def _wandb_id(directory: Path) -> str:
    """The id of a run's wandb run, kept in its directory, so that a resumed run goes on where it stopped."""
    path = directory / "wandb_id"
    if not path.is_file():
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def flat(config: dict[str, Any], above: str = "") -> dict[str, str | int | float | bool]:
    """Turn nested configuration into dotted keys with single values; lists as JSON, null as text.

    >>> flat({"trainer": {"epochs": 2, "max_steps": None}, "layers": [0, 1]})
    {'trainer.epochs': 2, 'trainer.max_steps': 'null', 'layers': '[0, 1]'}
    """
    values: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f"{above}{key}.")
        else:
            values[above + key] = value if isinstance(value, str | int | float) else json.dumps(value)
    return values


# Loss spikes: a sign of bad records, or of a learning rate on the edge.

WINDOW = 64  # steps whose losses the next one is compared with
FEWEST = 16  # with fewer losses nothing is a spike
DEVIATIONS = 6.0  # of a Gaussian as wide as the window: one step in a thousand million by chance
SMALLEST_SHARE = 0.1  # of the usual loss: on a flat curve six deviations are very little
_MAD_TO_DEVIATION = 1.4826  # of a Gaussian


class LossSpikes:
    """Detects a loss far above those of the last steps.

    It compares by median and median absolute deviation, which the spike itself hardly changes.

    Args:
        losses: of the steps so far, so that a resumed run detects the same spikes as an uninterrupted one.
    """

    def __init__(self, losses: Iterable[float]) -> None:
        self._window = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def usual_if_spike(self, loss: float) -> float | None:
        """Add a step's loss.

        Returns:
            The median of the losses before, if this one is far above it; None otherwise.
        """
        window = list(self._window)
        self._window.append(loss)
        if len(window) < FEWEST:
            return None
        usual = median(window)
        deviation = _MAD_TO_DEVIATION * median(abs(value - usual) for value in window)
        far = loss - usual > max(DEVIATIONS * deviation, SMALLEST_SHARE * abs(usual))
        return usual if far else None
