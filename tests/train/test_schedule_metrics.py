"""Learning rates at the ends of the schedule; metrics.jsonl after a crash; failing trackers never end a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from finetune.config.schema import LoggingConfig, TrainerConfig
from finetune.train.metrics import MetricsLog, Tracker, memory_gib
from finetune.train.optim import learning_rate, warmup_steps
from finetune.train.watchdog import StopRequest

# ---- learning rate --------------------------------------------------------------------------------------------------


def rates(total: int, **settings: Any) -> list[float]:
    config = TrainerConfig(learning_rate=1e-3, **settings)
    return [learning_rate(step, total, config) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_starts_at_a_share_and_ends_at_the_peak(schedule: str) -> None:
    found = rates(100, schedule=schedule, warmup_ratio=0.1)
    assert found[0] == pytest.approx(1e-4)
    assert found[4] == pytest.approx(5e-4)
    assert found[9] == pytest.approx(1e-3) and found[10] == pytest.approx(1e-3)
    assert max(found) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("schedule", "share", "last"), [("cosine", 0.1, 1e-4), ("linear", 0.0, 0.0), ("linear", 1, 1e-3)]
)
def test_the_last_step_has_the_final_share(schedule: str, share: float, last: float) -> None:
    found = rates(50, schedule=schedule, warmup_ratio=0.0, min_lr_ratio=share)
    assert found[0] == pytest.approx(1e-3) and found[-1] == pytest.approx(last)
    assert found == sorted(found, reverse=True)


def test_the_middle_step_has_half_the_decay() -> None:
    for schedule in ("cosine", "linear"):
        found = rates(101, schedule=schedule, warmup_ratio=0.0, min_lr_ratio=0.2)
        assert found[50] == pytest.approx(0.6e-3)
    assert found[25] == pytest.approx(0.8e-3)  # linear; a cosine is higher there
    assert rates(101, schedule="cosine", warmup_ratio=0.0, min_lr_ratio=0.2)[25] > 0.85e-3


def test_constant_schedule_keeps_the_peak() -> None:
    assert rates(10, schedule="constant", warmup_ratio=0.0) == [1e-3] * 10


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_very_short_runs_never_have_a_zero_or_an_excessive_rate(total: int, share: float) -> None:
    found = rates(total, warmup_ratio=share)
    assert all(0 < rate <= 1e-3 for rate in found)


def test_warm_up_is_rounded_up() -> None:
    assert [warmup_steps(total, TrainerConfig(warmup_ratio=0.03)) for total in (1, 33, 34, 100)] == [1, 1, 2, 3]
    assert warmup_steps(100, TrainerConfig(warmup_ratio=0.0)) == 0


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_later_and_partial_lines_are_dropped(tmp_path: Path) -> None:
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


def test_memory_is_measured_for_this_process() -> None:
    assert 0.05 < memory_gib(torch.device("cpu")) < 100


# ---- tracker --------------------------------------------------------------------------------------------------------


class FakeTracker:
    """Tracker that records calls, and raises in a chosen one."""

    def __init__(self, fails_in: str | None = None) -> None:
        self.fails_in, self.calls = fails_in, []  # type: ignore[var-annotated]

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise ConnectionError("no route to the tracker")

    def start(self) -> None:
        self._called("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._called("config")

    def log(self, figures: dict[str, float], step: int) -> None:
        self._called("log")

    def finish(self) -> None:
        self._called("finish")


MAIN = SimpleNamespace(is_main_process=True)


@pytest.fixture
def track(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    def run(fails_in: str | None = None, tracker: str = "wandb", accelerator: Any = MAIN) -> list[str]:
        fake = FakeTracker(fails_in)
        monkeypatch.setattr("finetune.train.metrics.make_tracker", lambda config, directory: fake)
        tracking = Tracker(accelerator, LoggingConfig(tracker=tracker), {}, tmp_path)  # type: ignore[arg-type]
        tracking.log({"loss": 1.0}, 1)
        tracking.log({"loss": 1.0}, 2)
        tracking.close()
        return fake.calls

    return run


def test_a_working_tracker_gets_the_metrics(
    track: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert track() == ["start", "config", "log", "log", "finish"] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fails_in", "calls"),
    [
        ("start", ["start"]),
        ("config", ["start", "config"]),
        ("log", ["start", "config", "log"]),
        ("finish", ["start", "config", "log", "log", "finish"]),
    ],
)
def test_a_failing_tracker_is_reported_once(
    track: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], fails_in: str, calls: list[str]
) -> None:
    assert track(fails_in) == calls
    said = capsys.readouterr().err
    assert said.count("tracking is off") == 1 and "ConnectionError: no route to the tracker" in said


def test_without_a_tracker_nothing_is_sent_and_only_rank_0_sends(track: Callable[..., list[str]]) -> None:
    assert track(tracker="none") == []
    assert track(accelerator=SimpleNamespace(is_main_process=False)) == []


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "mlflow", "trackio"])
def test_a_missing_tracker_package_is_named(
    track: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tracker: str,
) -> None:
    monkeypatch.setattr("finetune.train.metrics.importlib.util.find_spec", lambda _: None)
    assert track(tracker=tracker) == []
    said = capsys.readouterr().err
    assert f"tracking is off: {tracker} is not installed" in said and said.count("\n") == 1


RUN_CONFIG = {"seed": 0, "trainer": {"learning_rate": 2e-4, "max_steps": None}, "layers": [0, 1]}


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Accelerator(cpu=True)  # Accelerate's trackers ask its state which process this is
    tracker = Tracker(MAIN, LoggingConfig(tracker="tensorboard"), RUN_CONFIG, tmp_path)  # type: ignore[arg-type]
    for step, loss in ((1, 2.5), (2, 1.25)):
        tracker.log({"loss": loss}, step)
    tracker.log_image("map", np.full((3, 5), 128, dtype=np.uint8), 2)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (image,) = events.Images("map")
    assert (image.step, image.height, image.width) == (2, 3, 5)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    (settings,) = tmp_path.glob("tensorboard/*/hparams.yml")
    assert "trainer.learning_rate: 0.0002\ntrainer.max_steps: 'null'" in settings.read_text()


def test_mlflow_writes_into_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stub of the package, which is large: Accelerate's own class calls it."""
    calls: dict[str, Any] = {}

    def record(name: str, answer: Any = None) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.setdefault(name, (args, kwargs)), answer)[1]

    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    stand_in = SimpleNamespace(
        utils=SimpleNamespace(validation=limits),
        search_experiments=record("search", []),
        create_experiment=record("create", "7"),
        **{name: record(name) for name in ("start_run", "log_params", "log_metrics", "end_run")},
    )
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr("finetune.train.metrics.importlib.util.find_spec", lambda _: True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://elsewhere.example")
    Accelerator(cpu=True)
    tracker = Tracker(MAIN, LoggingConfig(tracker="mlflow"), RUN_CONFIG, tmp_path)  # type: ignore[arg-type]
    tracker.log({"loss": 2.5}, 1)
    tracker.close()
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"  # offline means offline
    assert calls["create"][1]["name"] == "gpt-oss-finetune"
    assert calls["start_run"][1]["experiment_id"] == "7" and calls["start_run"][1]["run_name"] == tmp_path.name
    (params,) = calls["log_params"][0]
    assert params["trainer.learning_rate"] == 2e-4 and params["layers"] == "[0, 1]"
    assert calls["log_metrics"] == (({"loss": 2.5},), {"step": 1}) and "end_run" in calls


def test_trackio_writes_into_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stub of the package, as above."""
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda *a, **k: calls.append((a, k)), finish=lambda: calls.append("finish"))
    stand_in = SimpleNamespace(
        init=lambda **k: (calls.append(k), run)[1],
        config=SimpleNamespace(update=lambda values, **_: calls.append(values["seed"])),
    )
    monkeypatch.setitem(sys.modules, "trackio", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr("finetune.train.metrics.importlib.util.find_spec", lambda _: True)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/elsewhere")
    monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
    Accelerator(cpu=True)
    tracker = Tracker(MAIN, LoggingConfig(tracker="trackio"), RUN_CONFIG, tmp_path)  # type: ignore[arg-type]
    tracker.log({"loss": 2.5}, 1)
    tracker.close()
    assert calls == [
        {"project": "gpt-oss-finetune", "name": tmp_path.name},
        0,
        (({"loss": 2.5},), {"step": 1}),
        "finish",
    ]
    assert "TRACKIO_SPACE_ID" not in os.environ and os.environ["TRACKIO_DIR"] == f"{tmp_path}/trackio"


def test_only_numbers_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker()
    monkeypatch.setattr("finetune.train.metrics.make_tracker", lambda config, directory: fake)
    tracking = Tracker(MAIN, LoggingConfig(tracker="wandb"), {}, tmp_path)  # type: ignore[arg-type]
    tracking.log({"loss": 1.0, "row": "a clause of somebody's contract"}, 1)  # type: ignore[dict-item]
    assert fake.calls == ["start", "config"]


WANDB = """
import sys
from pathlib import Path
from accelerate import Accelerator
from finetune.config.schema import LoggingConfig
from finetune.train.metrics import Tracker
config = LoggingConfig(tracker="wandb")
tracker = Tracker(Accelerator(cpu=True), config, {"seed": 0}, Path(sys.argv[1]))
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
def test_the_first_signal_requests_a_stop(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_number is None
        signal.raise_signal(number)
        assert stop.signal_number == number
        assert number.name in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before


def test_a_signal_during_printing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error may be in use when the signal comes; writing through it again would raise."""

    def refuses(*_: object) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=refuses, flush=refuses))
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal_number == signal.SIGTERM
