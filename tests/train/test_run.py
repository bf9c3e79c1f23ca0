"""Whole runs on a very small base: their files, and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import ADAPTER_FILES, Train, flip_bit, manifest_of

from finetune.cli.main import main
from finetune.errors import ConfigError
from finetune.results import read_evaluation
from finetune.train.checkpoint import list_checkpoints, load_newest
from finetune.train.run_directory import Run
from finetune.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- a finished run -------------------------------------------------------------------------------------------------


def test_files_of_a_finished_run(finished: tuple[Path, str]) -> None:
    run, _ = finished
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    checkpoint = ("adapter.safetensors", "manifest.json", "optimizer.safetensors", "state.json")
    assert files == {
        *(".lock", "config.yaml", "manifest.json", "metrics.jsonl", "evaluation.json", "sample.json"),
        *("report.md", "report.html", "checkpoints/latest"),
        *(f"adapter/{name}" for name in ADAPTER_FILES),
        *(f"checkpoints/step-{step:08d}/{name}" for step in (6, 8) for name in checkpoint),
    }


def test_its_manifest_records_the_checks(finished: tuple[Path, str]) -> None:
    manifest = manifest_of(finished[0])
    assert manifest["status"] == "finished" and manifest["stopped_by"] is None
    assert manifest["total_steps"] == 8 and manifest["loop"]["step"] == 8
    assert len(manifest["audit"]) == 2 and manifest["audit"][0] != manifest["audit"][1]
    found = manifest["read_back"]
    assert 0 <= found["max_difference"] <= found["limit"]
    assert found["max_difference"] <= found["limit"] < 1e-2 < found["effect"]
    assert found["conclusive"]
    assert len(manifest["base"]["identity"]) == 64
    assert [manifest["data"][split]["rows"] for split in ("train", "validation", "test")] == [24, 6, 10]
    # q, k, v, o of hidden 64, 4 query and 2 key heads of 32; experts 8 x (64 -> 2 x 96 and 96 -> 64); 2 layers.
    attention = 2 * 4 * ((64 + 128) + 2 * (64 + 64) + (128 + 64))
    experts = 2 * 8 * 4 * ((64 + 192) + (96 + 64))
    assert manifest["adapter_parameters"] == {"attention": attention, "experts": experts}
    assert manifest["minutes"] > 0 and manifest["peak_memory_gib"] > 0.1
    assert len(manifest["adapter_norms"]) == 2 * (4 + 2) and min(manifest["adapter_norms"].values()) > 0


def test_its_report_shows_curves_an_example_and_norms(finished: tuple[Path, str]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert page.count("<polyline") == 8 and "<mark>" in page and "12 weights" in page
    assert "cannot be made from" not in page and "could not be read" not in page


def test_its_metrics_have_one_line_per_step_and_validation(finished: tuple[Path, str]) -> None:
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [3, 6, 8]
    assert {line["epoch"] for line in steps} == {0, 1}  # a step in the middle of each
    assert steps[0]["learning_rate"] == pytest.approx(1e-2) and steps[-1]["learning_rate"] == pytest.approx(1e-3)
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["tokens_per_second"] > 0 for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_its_evaluation_shows_an_improvement(finished: tuple[Path, str]) -> None:
    run, printed = finished
    evaluation = read_evaluation(run / "evaluation.json")
    assert evaluation is not None and evaluation.test is not None
    before, after = evaluation.test.loss.base, evaluation.test.loss.adapter
    assert evaluation.test.rows == 10 and evaluation.test.num_labels == 3
    assert before and after and after.interval
    assert after.value < before.value
    assert after.interval[0] < after.value < after.interval[1]
    assert f"{before.value:.3f}" in printed and f"{after.value:.3f}" in printed
    assert f"adapter    {run / 'adapter'}" in printed
    assert "status: **finished**" in (run / "report.md").read_text()


def test_a_finished_run_is_not_resumed(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished[0] / "manifest.json").read_bytes()
    assert main(["train", "--resume", str(finished[0])]) == 2
    assert "is finished" in capsys.readouterr().err
    assert (finished[0] / "manifest.json").read_bytes() == before


def test_an_existing_run_is_never_overwritten(
    finished: tuple[Path, str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished[0].rglob("*") if path.is_file()}
    assert main(["train", str(workplace / "small.yaml"), f"output_dir={workplace}", "name=finished"]) == 2
    said = capsys.readouterr().err
    assert "exists already" in said and f"finetune train --resume {finished[0]}" in said
    assert before == {path: path.read_bytes() for path in finished[0].rglob("*") if path.is_file()}


# ---- everyday keys --------------------------------------------------------------------------------------------------


def exported(run: Path) -> list[torch.Tensor]:
    """All exported tensors by size and sum, so that layouts do not matter."""
    return list(load_file(run / "adapter" / "adapter_model.safetensors").values())


def total(tensors: Any) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors)


def test_the_best_adapter_is_exported_and_training_stops_early(train: Train, validation_losses: list[float]) -> None:
    validation_losses += [3.0, 1.0, 2.0, 1.5]
    best = ("save.best_metric=validation_loss", "trainer.early_stop_patience=2", "evaluate.every_steps=1")
    code, run = train(*best, "save.keep=1")
    assert code == 0 and not validation_losses
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [2, 4]
    manifest = manifest_of(run)
    assert manifest["adapter_of_step"] == 2 and manifest["loop"]["step"] == 4
    of_step = {
        step: total(load_file(path / "adapter.safetensors").values())
        for step, path in list_checkpoints(run / "checkpoints")
    }
    assert total(exported(run)) == pytest.approx(of_step[2], rel=1e-9)
    assert abs(of_step[2] - of_step[4]) > 1e-6 * of_step[2]
    assert "the adapter is the one of step 2" in (run / "report.md").read_text()


def test_a_damaged_best_checkpoint_is_not_exported(
    train: Train, validation_losses: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.train import run as run_module

    validation_losses += [1.0, 2.0]
    choose_best = run_module._choose_best

    def damage_and_choose(trainer: Any, run: Any) -> None:
        flip_bit(run.checkpoints / "step-00000003" / "adapter.safetensors")
        choose_best(trainer, run)

    monkeypatch.setattr(run_module, "_choose_best", damage_and_choose)
    code, run = train("save.best_metric=validation_loss", "trainer.max_steps=6")
    assert code == 3 and not (run / "adapter").exists()
    assert "step-00000003 is damaged" in capsys.readouterr().err


def test_continuing_from_an_adapter(train: Train, finished: tuple[Path, str]) -> None:
    """With a negligible learning rate it scores as the run that it continues from."""
    code, run = train(
        f"adapter.init_from={finished[0] / 'adapter'}", "trainer.max_steps=1", "trainer.learning_rate=1e-12"
    )
    assert code == 0
    first, second = (json.loads((r / "evaluation.json").read_text())["suites"][0]["loss"] for r in (finished[0], run))
    assert second["base"]["value"] == pytest.approx(first["base"]["value"], abs=1e-6)
    assert second["adapter"]["value"] == pytest.approx(first["adapter"]["value"], abs=1e-4)
    assert abs(first["adapter"]["value"] - first["base"]["value"]) > 0.1


# ---- what must not happen -------------------------------------------------------------------------------------------


def test_non_finite_values_stop_before_the_update(
    train: Train, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    code, run = train("trainer.learning_rate=1000", "save.every_steps=1", "evaluate.every_steps=null")
    assert code == 6
    said = capsys.readouterr().err
    assert "step 2 is not finite" in said and "no update was made" in said
    ids = [json.loads(line)["id"] for line in (workplace / "train.jsonl").read_text().splitlines()]
    assert any(name in said for name in ids)
    step, checkpoint = load_newest(run / "checkpoints")
    assert step == 1
    assert all(tensor.isfinite().all() for tensor in [*checkpoint.adapter.values(), *checkpoint.optimizer.values()])
    assert not (run / "adapter").exists()
    assert manifest_of(run)["status"] == "stopped" and "not finite" in manifest_of(run)["stopped_by"]


def test_an_adapter_non_finite_after_the_last_step_is_not_exported(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without validation, the test evaluation detects it first."""
    count = Trainer._record

    def count_and_spoil(self: Trainer, *args: Any) -> None:
        count(self, *args)
        with torch.no_grad():
            next(iter(self.adapter.parameters().values())).view(-1)[0] = torch.nan

    monkeypatch.setattr(Trainer, "_record", count_and_spoil)
    recipe = (workplace / "small.yaml").read_text().replace("every_steps: 3, ", "")
    recipe = "".join(line for line in recipe.splitlines(keepends=True) if "validation" not in line)
    (tmp_path / "unwatched.yaml").write_text(recipe)
    overrides = ["trainer.max_steps=1", f"output_dir={tmp_path}", "name=run"]
    assert main(["train", str(tmp_path / "unwatched.yaml"), *overrides]) == 6
    said = capsys.readouterr().err
    assert "test: the loss of" in said and "is nan" in said
    assert not (tmp_path / "run" / "adapter").exists()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("damage", "said"), [(flip_bit, "sha256"), (cut, ""), (Path.unlink, "lacks")])
def test_a_damaged_base_is_refused(
    train: Train,
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    damage(base / "model-00002-of-00003.safetensors")
    code, run = train(f"model.path={base}")
    message = capsys.readouterr().err
    assert code == 3 and not run.exists()
    assert "model-00002-of-00003.safetensors" in message and said in message


def test_a_missing_base_is_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = train(f"model.path={tmp_path / 'bsae'}")
    assert code == 3 and not run.exists()
    assert "bsae" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(
    train: Train, finished: tuple[Path, str], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "checksums.json").unlink()
    shard = base / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    code, run = train(f"model.path={base}", f"adapter.init_from={finished[0] / 'adapter'}")
    assert code == 3 and not run.exists()
    assert "was trained on another base" in capsys.readouterr().err


def test_a_damaged_adapter_is_refused(
    train: Train, finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(finished[0] / "adapter", adapter)
    flip_bit(adapter / "adapter_model.safetensors")
    code, run = train(f"adapter.init_from={adapter}")
    assert code == 3 and not run.exists()
    assert "is not the file that was written" in capsys.readouterr().err


def test_bad_records_are_named_by_file_and_line(
    train: Train, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (workplace / "train.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-20]
    (tmp_path / "broken.jsonl").write_text("\n".join(lines) + "\n")
    code, run = train(f"data.train.mine.path={tmp_path / 'broken.jsonl'}")
    assert code == 3 and not run.exists()
    assert f"{tmp_path / 'broken.jsonl'}:7: the line is not JSON" in capsys.readouterr().err


def test_an_impossible_run_directory_is_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", str(workplace / "small.yaml"), f"output_dir={tmp_path / 'file'}", "name=run"]) == 5
    assert "cannot make the run directory" in capsys.readouterr().err


def test_the_base_s_files_are_unchanged(finished: tuple[Path, str], tiny_base: Path) -> None:
    listed = json.loads((tiny_base / "checksums.json").read_text())["files"]
    assert all(hashlib.sha256((tiny_base / name).read_bytes()).hexdigest() == digest for name, digest in listed.items())


def test_a_run_locked_by_another_process_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    run = replace(Run.open(finished[0]), path=tmp_path)
    held = "import sys, time; from pathlib import Path; from finetune.train.run_directory import Run\n"
    held += f"with Run(Path({str(tmp_path)!r}), None).locked():\n    print('held', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {other.pid}"), run.locked():
            pass
        other.kill()
    with run.locked():  # the kernel let go of it
        pass


def test_settings_of_a_foreign_launcher_are_refused(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train()[0] == 5
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in capsys.readouterr().err


def test_each_skipped_record_is_named(train: Train, workplace: Path, tmp_path: Path) -> None:
    rows = (workplace / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*rows[:4], "{broken", *rows[4:]]) + "\n")
    source = f"data.train.mine.path={tmp_path / 'train.jsonl'}"
    code, run = train(source, "data.on_bad_record=skip", "trainer.max_steps=1", "evaluate.every_steps=null")
    assert code == 0
    (named,) = [json.loads(line) for line in (run / "skipped_rows.jsonl").read_text().splitlines()]
    assert named["split"] == "train" and named["where"].endswith("train.jsonl:5")
