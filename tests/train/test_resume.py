"""Stopping and resuming runs: a resumed run is bit-identical to an uninterrupted one."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import (
    Train,
    assert_same_run,
    finetune,
    flip_bit,
    manifest_of,
    metrics_of,
    signal_after,
    wait_for_steps,
)

from finetune.cli.main import main
from finetune.train.checkpoint import list_checkpoints, load_newest, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: int
) -> None:
    """Stopped twice: in the middle of the first epoch and of the second."""
    torch.set_num_threads(threads)
    try:
        code, whole = train(name="whole")
        assert code == 0
        with monkeypatch.context() as patch:
            signal_after(patch, 2, signal.SIGTERM)
            code, stopped = train(name="stopped")
        assert code == 143
        assert not (stopped / "adapter").exists()
        assert [step for step, _ in list_checkpoints(stopped / "checkpoints")] == [2]
        assert manifest_of(stopped)["status"] == "stopped" and len(manifest_of(stopped)["audit"]) == 2
        assert f"finetune train --resume {stopped}" in capsys.readouterr().err
        with monkeypatch.context() as patch:
            signal_after(patch, 7, signal.SIGINT)
            assert main(["train", "--resume", str(stopped)]) == 130
        assert main(["train", "--resume", str(stopped)]) == 0
    finally:
        torch.set_num_threads(1)
    assert_same_run(whole, stopped)
    manifest = manifest_of(stopped)
    assert manifest["status"] == "finished" and manifest["stopped_by"] is None
    assert manifest["audit"] == manifest_of(whole)["audit"]


def test_the_comparison_of_runs_can_fail(finished: tuple[Path, str], tmp_path: Path) -> None:
    """One optimiser value that differs in the last place is detected."""
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    assert_same_run(finished[0], copy)
    step, checkpoint = load_newest(copy / "checkpoints")
    shutil.rmtree(copy / "checkpoints" / f"step-{step:08d}")
    moment = checkpoint.optimizer["model.layers.1.mlp.experts.down_b/exp_avg"]
    moment[-1, -1, -1] = moment[-1, -1, -1].nextafter(torch.tensor(1.0))
    save_checkpoint(copy / "checkpoints", step, checkpoint)
    with pytest.raises(AssertionError):
        assert_same_run(finished[0], copy)


def test_the_command_in_another_process_gives_the_same_bits(train: Train, finished: tuple[Path, str]) -> None:
    _, here = train("save.every_steps=3")
    assert_same_run(finished[0], here)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_prints_how_to_resume(
    workplace: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    long_run = ("trainer.epochs=500", "trainer.max_steps=5000", "evaluate.every_steps=null", f"output_dir={tmp_path}")
    process = finetune("train", workplace / "small.yaml", "name=run", *long_run)
    wait_for_steps(process, tmp_path / "run", 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert errors.rstrip().endswith(f"resume with `finetune train --resume {tmp_path / 'run'}`")
    step, checkpoint = load_newest(tmp_path / "run" / "checkpoints")
    assert step == len(metrics_of(tmp_path / "run")) and checkpoint.state["loop"]["step"] == step
    assert not (tmp_path / "run" / "adapter").exists()
    assert "Interrupted" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(workplace: Path, tmp_path: Path, train: Train) -> None:
    arguments = ("train", workplace / "small.yaml", f"output_dir={tmp_path}", "save.every_steps=1")
    process = finetune(*arguments, "name=killed")
    wait_for_steps(process, tmp_path / "killed", 4)
    process.kill()
    process.communicate()
    assert manifest_of(tmp_path / "killed")["status"] == "running"
    assert main(["train", "--resume", str(tmp_path / "killed")]) == 0
    _, whole = train("save.every_steps=1", name="whole")
    assert_same_run(whole, tmp_path / "killed")
    assert (tmp_path / "killed" / "adapter").is_dir()


def test_a_second_ctrl_c_exits_at_once(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal_after(monkeypatch, 4, signal.SIGINT, times=2)
    code, run = train("save.every_steps=3")
    assert code == 130
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.rstrip().endswith("stopped")
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [3]
    assert manifest_of(run)["stopped_by"] == "KeyboardInterrupt"


def test_a_signal_while_evaluating_before_training(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.evaluate import likelihood

    with monkeypatch.context() as patch:
        collate = likelihood.collate

        def collate_and_signal(rows: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return collate(rows)

        patch.setattr(likelihood, "collate", collate_and_signal)
        code, run = train()
    assert code == 143 and "while evaluating" in capsys.readouterr().err
    assert not (run / "evaluation.json").exists()
    assert main(["train", "--resume", str(run)]) == 0
    assert json.loads((run / "evaluation.json").read_text())["suites"][0]["rows"] == 10


def test_a_signal_while_evaluating_after_training(
    train: Train, finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is unchanged, and there is no adapter that could be mistaken for the result."""
    from finetune.train import run as run_module

    evaluate = run_module.measure_test_set

    def evaluate_and_signal(base: Any, test: Any, model: str, *args: Any, **kwargs: Any) -> Any:
        if model == "adapter":
            signal.raise_signal(signal.SIGINT)
        return evaluate(base, test, model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "measure_test_set", evaluate_and_signal)
        code, run = train("save.every_steps=3")
    assert code == 130 and not (run / "adapter").exists()
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(finished[0], run)


def test_resuming_falls_back_to_an_older_intact_checkpoint(
    train: Train, finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        signal_after(patch, 7, signal.SIGTERM)
        _, run = train("save.every_steps=3")
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [6, 7]
    flip_bit(run / "checkpoints" / "step-00000007" / "optimizer.safetensors")
    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().err
    assert "step-00000007 is damaged" in said and "resuming after step 6 of 8" in said
    assert_same_run(finished[0], run)


def test_a_damaged_checkpoint_does_not_count_as_newest_later(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        signal_after(patch, 5, signal.SIGTERM)
        _, run = train("save.every_steps=3")
    flip_bit(run / "checkpoints" / "step-00000005" / "state.json")
    with monkeypatch.context() as patch:
        signal_after(patch, 4, signal.SIGTERM)
        assert main(["train", "--resume", str(run)]) == 143
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [3, 4]


def test_the_audit_is_kept_after_a_kill(stopped: Path) -> None:
    """After a kill the manifest lacks the audit; the checkpoint records it."""
    manifest = manifest_of(stopped)
    audit = manifest.pop("audit")
    (stopped / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    assert main(["train", "--resume", str(stopped)]) == 0
    assert manifest_of(stopped)["audit"] == audit


def test_resuming_after_an_early_stop_makes_no_further_step(
    train: Train, validation_losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.train import run as run_module

    validation_losses += [1.0, 2.0, 3.0, 4.0]
    with monkeypatch.context() as patch:
        choose_best = run_module._choose_best

        def choose_and_stop(*args: Any) -> None:
            choose_best(*args)
            signal.raise_signal(signal.SIGTERM)

        patch.setattr(run_module, "_choose_best", choose_and_stop)
        best = ("save.best_metric=validation_loss", "trainer.early_stop_patience=2", "evaluate.every_steps=1")
        code, run = train(*best)
    assert code == 143 and manifest_of(run)["loop"]["step"] == 3
    assert main(["train", "--resume", str(run)]) == 0
    assert manifest_of(run)["loop"]["step"] == 3 and validation_losses == [4.0]


def test_a_signal_while_validating(
    train: Train, tmp_path: Path, finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops before the validation ends, and the resumed run repeats the validation."""
    from finetune.evaluate import likelihood

    collate, metrics = likelihood.collate, tmp_path / "run" / "metrics.jsonl"

    def collate_and_signal(rows: Any) -> Any:
        if metrics.exists() and metrics.read_text().count("\n") == 3:
            signal.raise_signal(signal.SIGTERM)
        return collate(rows)

    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "collate", collate_and_signal)
        code, run = train("save.every_steps=3")
    assert code == 143 and len(metrics_of(run)) == 3
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(finished[0], run)


@pytest.fixture
def stopped(train: Train, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run stopped after step 2."""
    with monkeypatch.context() as patch:
        signal_after(patch, 2, signal.SIGTERM)
        return train()[1]


def test_resuming_on_other_data_is_refused(
    stopped: Path, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(workplace / "validation.jsonl", tmp_path / "other.jsonl")
    config = stopped / "config.yaml"
    config.write_text(config.read_text().replace(str(workplace / "train.jsonl"), str(tmp_path / "other.jsonl")))
    assert main(["train", "--resume", str(stopped)]) in (3, 6)
    assert "data fingerprint is not this run's" in capsys.readouterr().err


def test_resuming_with_another_adapter_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = stopped / "config.yaml"
    config.write_text(config.read_text().replace("rank: 4", "rank: 8", 1))
    assert main(["train", "--resume", str(stopped)]) == 2
    assert "config.yaml was edited since the run began: adapter.attention.rank: 4 -> 8" in capsys.readouterr().err
    manifest = manifest_of(stopped)
    del manifest["config"]  # as runs of 0.1 are
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    assert main(["train", "--resume", str(stopped)]) == 3
    said = capsys.readouterr().err
    assert "does not hold the adapter" in said and "make config.yaml as it was" in said


def test_resuming_without_a_checkpoint_or_a_run(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    assert main(["train", "--resume", str(stopped)]) == 3
    assert "no whole checkpoint" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "rnu")]) == 3
    said = capsys.readouterr().err
    assert "is not a run directory" in said and "run" in said.partition("fix")[2]
