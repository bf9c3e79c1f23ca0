"""Background checkpoints: they store the state they were given, and failures are raised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_run import Train, assert_same_run, flip_bit, metrics_of

from finetune.cli.main import main
from finetune.config.schema import SaveConfig, TrainerConfig
from finetune.errors import MachineError
from finetune.train import checkpoint as checkpoint_writer
from finetune.train.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from finetune.train.engines.base import single_engine
from finetune.train.optim import make_optimizer


class Gate:
    """Wrapper of `save_checkpoint`: writes wait until it is opened, or fail."""

    def __init__(self) -> None:
        self.open, self.waiting, self.failure = threading.Event(), threading.Event(), ""
        self.steps: list[int] = []

    def __call__(self, directory: Path, step: int, checkpoint: Checkpoint) -> Path:
        self.waiting.set()
        assert self.open.wait(20)
        self.steps.append(step)
        if self.failure:
            raise MachineError(self.failure)
        return save_checkpoint(directory, step, checkpoint)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", gate)
    yield gate
    gate.open.set()


def moment(value: float) -> Checkpoint:
    return Checkpoint({"a": torch.full((4,), value)}, {"a/step": torch.tensor(value)}, {"loop": {"step": value}})


def test_what_an_engine_gives_to_save_stays_as_it_is_in_the_next_step() -> None:
    """A background save writes it while training goes on."""
    parameters = {"a": torch.nn.Parameter(torch.ones(4))}
    config = TrainerConfig(learning_rate=0.1)
    engine = single_engine(parameters, make_optimizer(parameters, config), config)

    def step() -> None:
        parameters["a"].grad = torch.full((4,), 0.5)
        engine.step()

    step()
    given = engine.adapter_tensors() | engine.optimizer_tensors()
    then = {name: tensor.clone() for name, tensor in given.items()}
    step()
    now = engine.adapter_tensors() | engine.optimizer_tensors()
    assert len(given) == 4 and all(torch.equal(given[name], then[name]) for name in given)
    assert not any(torch.equal(now[name], then[name]) for name in given), "the step changed all of it"


def test_a_background_save_is_written_while_the_caller_goes_on(tmp_path: Path, gate: Gate) -> None:
    with CheckpointWriter(tmp_path, 2, background=True) as writer:
        writer.save(1, moment(1.0), None)
        assert gate.waiting.wait(20) and list_checkpoints(tmp_path) == []
        writer.check()
        gate.open.set()
    found = load_checkpoint(checkpoint_path(tmp_path, 1))
    assert found.adapter["a"].tolist() == [1.0] * 4 and found.optimizer["a/step"] == 1.0
    assert found.state == {"loop": {"step": 1.0}}


def test_a_foreground_save_is_on_disk_on_return(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    writer = CheckpointWriter(tmp_path, 1, background=False)
    for step in (1, 2):
        writer.save(step, moment(step), None)
        assert [step for step, _ in list_checkpoints(tmp_path)] == [step]


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: Gate) -> None:
    writer = CheckpointWriter(tmp_path, 2, background=True)
    writer.save(1, moment(1), None)
    assert gate.waiting.wait(20)
    second = threading.Thread(target=writer.save, args=(2, moment(2), None))
    second.start()
    second.join(0.2)
    assert second.is_alive() and gate.steps == []
    gate.open.set()
    second.join()
    writer.wait()
    assert gate.steps == [1, 2] and [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]


CALLS: dict[str, Callable[[CheckpointWriter], None]] = {
    "check": CheckpointWriter.check,
    "wait": CheckpointWriter.wait,
    "save": lambda writer: writer.save(2, moment(2), None),
    "exit": lambda writer: writer.__exit__(None, None, None),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_failure_is_raised_by_the_next_call_and_only_once(tmp_path: Path, gate: Gate, call: str) -> None:
    gate.failure = "the disk is full"
    gate.open.set()
    writer = CheckpointWriter(tmp_path, 2, background=True)
    writer.save(1, moment(1), None)
    assert writer._thread is not None
    writer._thread.join()
    with pytest.raises(MachineError, match="the disk is full"):
        CALLS[call](writer)
    gate.failure = ""
    writer.save(3, moment(3), None)
    writer.wait()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]


def test_a_failed_save_does_not_hide_the_run_s_error(
    tmp_path: Path, gate: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    gate.failure = "the disk is full"
    gate.open.set()
    with pytest.raises(ValueError, match="loss"), CheckpointWriter(tmp_path, 2, background=True) as writer:
        writer.save(1, moment(1), None)
        raise ValueError("loss")
    assert "checkpoint of step 1 was not saved: the disk is full" in capsys.readouterr().err


def test_pruning_keeps_the_best(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, 1, background=True) as writer:
        for step in (1, 2, 3):
            writer.save(step, moment(step), best_step=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3]


# ---- in a run -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_background_and_foreground_saves_give_the_same_run(train: Train, finished: tuple[Path, str]) -> None:
    assert SaveConfig().background  # what the session's finished run used
    code, foreground = train("save.every_steps=3", "save.background=false")
    assert code == 0
    assert_same_run(finished[0], foreground)


@pytest.mark.usefixtures("one_thread")
def test_a_failed_write_stops_the_run_at_the_next_step(
    train: Train, gate: Gate, capsys: pytest.CaptureFixture[str], finished: tuple[Path, str]
) -> None:
    """The run resumes from the previous checkpoint, once there is space again, bit for bit."""
    gate.open.set()
    fails_at = 6

    def fail_late(directory: Path, step: int, checkpoint: Checkpoint) -> Path:
        gate.failure = "no space left" if step == fails_at else ""
        return gate(directory, step, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "save_checkpoint", fail_late)
        code, run = train("save.every_steps=3")
    assert code == 5 and "no space left" in capsys.readouterr().err
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [3]
    assert len([line for line in metrics_of(run) if line["kind"] == "step"]) >= fails_at
    gate.failure = ""
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(finished[0], run)


def test_verify_lists_intact_checkpoints_and_the_one_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        save_checkpoint(checkpoints, step, moment(step))
    verify = ["checkpoints", "verify", str(tmp_path / "run")]
    assert main(verify) == 0
    said = capsys.readouterr().out
    assert said.count("whole") == 3 and said.endswith("a resume continues after step 3\n")
    flip_bit(checkpoint_path(checkpoints, 3) / "optimizer.safetensors")
    (checkpoints / "step-00000004.partial").mkdir()
    assert main(verify) == 3
    output = capsys.readouterr()
    assert "step-00000003  damaged: optimizer.safetensors is not what was written" in output.out
    assert "step-00000004.partial  left by an interrupted save" in output.out
    assert output.out.endswith("a resume continues after step 2\n") and "1 of 3 checkpoints are damaged" in output.err


def test_verify_without_an_intact_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "verify", str(tmp_path)]) == 3
    assert "is not a run directory" in capsys.readouterr().err
    save_checkpoint(tmp_path / "checkpoints", 1, moment(1))
    (checkpoint_path(tmp_path / "checkpoints", 1) / "state.json").unlink()
    assert main(["checkpoints", "verify", str(tmp_path)]) == 3
    assert "no whole checkpoint" in capsys.readouterr().err
