"""The learning rate at its corners; metrics.jsonl after a crash; a tracker that fails never ends a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.config.schema import LoggingConfig, TrainerConfig
from finetune.train.metrics import MetricsLog, Tracker, memory_gib
from finetune.train.schedule import learning_rate, warmup_steps
from finetune.train.signals import StopRequest

# ---- learning rate --------------------------------------------------------------------------------------------------


def rates(total: int, **settings: Any) -> list[float]:
    config = TrainerConfig(learning_rate=1e-3, **settings)
    return [learning_rate(step, total, config) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_starts_at_a_share_and_ends_at_the_peak(schedule: str) -> None:
    found = rates(100, schedule=schedule, warmup_share=0.1)
    assert found[0] == pytest.approx(1e-4)
    assert found[4] == pytest.approx(5e-4)
    assert found[9] == pytest.approx(1e-3) and found[10] == pytest.approx(1e-3)
    assert max(found) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("schedule", "share", "last"), [("cosine", 0.1, 1e-4), ("linear", 0.0, 0.0), ("linear", 1, 1e-3)]
)
def test_the_last_step_has_the_final_share(schedule: str, share: float, last: float) -> None:
    found = rates(50, schedule=schedule, warmup_share=0.0, final_learning_rate_share=share)
    assert found[0] == pytest.approx(1e-3) and found[-1] == pytest.approx(last)
    assert found == sorted(found, reverse=True)


def test_the_middle_is_half_way() -> None:
    for schedule in ("cosine", "linear"):
        found = rates(101, schedule=schedule, warmup_share=0.0, final_learning_rate_share=0.2)
        assert found[50] == pytest.approx(0.6e-3)
    assert found[25] == pytest.approx(0.8e-3)  # linear; a cosine is higher there
    assert rates(101, schedule="cosine", warmup_share=0.0, final_learning_rate_share=0.2)[25] > 0.85e-3


def test_constant_stays() -> None:
    assert rates(10, schedule="constant", warmup_share=0.0) == [1e-3] * 10


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_very_short_runs_never_have_a_zero_or_an_excessive_rate(total: int, share: float) -> None:
    found = rates(total, warmup_share=share)
    assert all(0 < rate <= 1e-3 for rate in found)


def test_warm_up_is_rounded_up() -> None:
    assert [warmup_steps(total, TrainerConfig(warmup_share=0.03)) for total in (1, 33, 34, 100)] == [1, 1, 2, 3]
    assert warmup_steps(100, TrainerConfig(warmup_share=0.0)) == 0


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_lines_after_a_step_are_dropped_and_half_ones(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.cut_after(3)  # nothing there yet
    assert not log.path.exists()
    for step in (1, 2, 3):
        log.append("step", step, loss=1 / step)
        log.append("evaluation", step, validation_loss=2.0)
    whole = log.path.read_text().splitlines()
    with log.path.open("ab") as file:
        file.write(b'{"kind": "step", "step": 2, "lo\xff')
    log.cut_after(2)
    assert log.path.read_text().splitlines() == whole[:4]
    assert json.loads(whole[2]) == {"kind": "step", "step": 2, "loss": 0.5}
    log.append("step", 3, loss=0.25)
    assert log.path.read_text().splitlines() == [*whole[:4], '{"kind": "step", "step": 3, "loss": 0.25}']
    assert list(tmp_path.iterdir()) == [log.path]
    log.cut_after(0)
    assert log.path.read_text() == ""


def test_memory_is_this_process_s() -> None:
    assert 0.05 < memory_gib(torch.device("cpu")) < 100


# ---- tracker --------------------------------------------------------------------------------------------------------


class FakeAccelerator:
    """Records calls, and raises in the one that is to fail."""

    def __init__(self, fails_in: str | None = None) -> None:
        self.fails_in, self.calls = fails_in, []  # type: ignore[var-annotated]

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise ConnectionError("no route to the tracker")

    def init_trackers(self, project: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        self._called("init")

    def log(self, figures: dict[str, float], step: int) -> None:
        self._called("log")

    def end_training(self) -> None:
        self._called("end")


def track(accelerator: FakeAccelerator, tmp_path: Path, tracker: str = "wandb") -> None:
    config = LoggingConfig(tracker=tracker)  # type: ignore[arg-type]
    tracking = Tracker(accelerator, config, {}, tmp_path)  # type: ignore[arg-type]
    tracking.log({"loss": 1.0}, 1)
    tracking.log({"loss": 1.0}, 2)
    tracking.close()


def test_a_tracker_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = FakeAccelerator()
    track(accelerator, tmp_path)
    assert accelerator.calls == ["init", "log", "log", "end"] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fails_in", "calls"), [("init", ["init"]), ("log", ["init", "log"]), ("end", ["init", "log", "log", "end"])]
)
def test_a_tracker_that_fails_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails_in: str, calls: list[str]
) -> None:
    accelerator = FakeAccelerator(fails_in)
    track(accelerator, tmp_path)
    assert accelerator.calls == calls
    said = capsys.readouterr().err
    assert said.count("tracking is off") == 1 and "ConnectionError: no route to the tracker" in said


def test_no_tracker_is_never_called(tmp_path: Path) -> None:
    accelerator = FakeAccelerator()
    track(accelerator, tmp_path, tracker="none")
    assert accelerator.calls == []


def test_a_tracker_that_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.train.metrics.importlib.util.find_spec", lambda _: None)
    accelerator = FakeAccelerator()
    track(accelerator, tmp_path)
    assert accelerator.calls == []
    assert "tracking is off: wandb is not installed" in capsys.readouterr().err


WANDB = """
import sys
from pathlib import Path
from accelerate import Accelerator
from finetune.config.schema import LoggingConfig
from finetune.train.metrics import Tracker
config = LoggingConfig(tracker="wandb")
tracker = Tracker(Accelerator(cpu=True, log_with="wandb"), config, {"seed": 0}, Path(sys.argv[1]))
tracker.log({"loss": 1.5}, 1)
tracker.close()
"""


def test_wandb_writes_a_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "tracking is off" not in done.stderr
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert written.stat().st_size > 100


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_number is None
        signal.raise_signal(number)
        assert stop.signal_number == number
        assert number.name in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before


def test_a_signal_in_the_middle_of_printing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error may be in use when the signal comes; writing through it again would raise."""

    def refuses(*_: object) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=refuses, flush=refuses))
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal_number == signal.SIGTERM
