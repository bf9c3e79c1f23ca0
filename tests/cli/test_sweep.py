"""`--sweep`: the runs of a grid, the table, and a failing run that does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.cli import sweep as module
from finetune.cli.main import main
from finetune.cli.sweep import comparison


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs are not made but noted; a learning rate of 0.3 fails."""
    made: list[list[str]] = []

    def run_one(recipe: str, overrides: list[str]) -> int:
        made.append(overrides)
        given = dict(text.split("=", 1) for text in overrides)
        rate = float(given["trainer.learning_rate"])
        if rate == 0.3:
            return 6
        run = Path(given["output_dir"]) / given["name"].strip("'")
        run.mkdir(parents=True)
        loss, accuracy = ({"adapter": {"value": value, "interval": None}} for value in (1 + rate, 0.5))
        test = {"suite": "test", "rows": 1, "records": 1, "loss": loss, "perplexity": {}, "accuracy": accuracy}
        rest = {"adapter": "adapter", "base": None, "notes": [], "left_out": {}, "contamination": None, "answers": None}
        evaluation = {"confidence": 0.95, "suites": [test], **rest}
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        (run / "manifest.json").write_text(json.dumps({"minutes": 2.0, "loop": {"best_loss": None}}))
        return 0

    monkeypatch.setattr(module, "_run_one", run_one)
    return made


def test_a_grid_runs_every_combination(
    fake_runs: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--sweep", "trainer.learning_rate=0.1,0.3", "--sweep", "adapter.layers=[0,1],[1,1]"]
    assert main(["train", "quickstart", f"output_dir={tmp_path}", "seed=3", *grid]) == 0
    varied = [[text for text in run if text.startswith(("trainer", "adapter"))] for run in fake_runs]
    assert varied == [
        ["trainer.learning_rate=0.1", "adapter.layers=[0,1]"],
        ["trainer.learning_rate=0.1", "adapter.layers=[1,1]"],
        ["trainer.learning_rate=0.3", "adapter.layers=[0,1]"],
        ["trainer.learning_rate=0.3", "adapter.layers=[1,1]"],
    ]
    assert all("seed=3" in run for run in fake_runs)
    table = capsys.readouterr().out
    assert "| 01 | 0.1 | [0,1] | 1.1000 | 0.5000 | 2.00 | **best** |" in table
    assert "validation loss" not in table, "no run has one"
    assert table.count("failed (6)") == 2
    (written,) = tmp_path.glob("sweep-*/sweep.md")
    assert table.strip() in written.read_text()


def test_the_name_is_the_sweeps_directory(
    fake_runs: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "quickstart", f"output_dir={tmp_path}", "name=mine", "--sweep", "trainer.learning_rate=0.1,0.2"]
    assert main(words) == 0
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["01", "02", "sweep.md"]
    assert [text for text in fake_runs[0] if "name=" in text] == ["name='01'"]
    capsys.readouterr()
    assert main(words) == 2
    assert f"{tmp_path / 'mine'} exists already" in capsys.readouterr().err
    assert main(["train", "quickstart", "--sweep", "name=a,b"]) == 2
    assert "names the sweep's directory" in capsys.readouterr().err


def test_every_combination_is_checked_before_the_first_run(
    fake_runs: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "quickstart", "--sweep", "trainer.learning_rate=0.1,fast"]) == 2
    assert main(["train", "quickstart", "--sweep", "trainer.learning_rat=0.1"]) == 2
    assert fake_runs == []
    assert "learning_rate" in capsys.readouterr().err


def test_all_failing_is_an_error(fake_runs: list[list[str]], tmp_path: Path) -> None:
    assert main(["train", "quickstart", f"output_dir={tmp_path}", "--sweep", "trainer.learning_rate=0.3"]) == 6


@pytest.mark.parametrize(
    "grid", ["trainer.learning_rate", "trainer.learning_rate=", "seed=1,,2", "seed=" + "1," * 70 + "1"]
)
def test_grids_that_cannot_be_read(fake_runs: list[list[str]], grid: str) -> None:
    assert main(["train", "quickstart", "--sweep", grid]) == 2
    assert fake_runs == []


def test_sweep_goes_neither_with_resume_nor_with_dry_run() -> None:
    assert main(["train", "quickstart", "--sweep", "seed=1,2", "--dry-run"]) == 2
    assert main(["train", "--resume", "runs/x", "--sweep", "seed=1,2"]) == 2


def test_without_test_records_the_validation_loss_decides(tmp_path: Path) -> None:
    for name, loss in (("01", 0.75), ("02", 0.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"loop": {"best_loss": loss}}))
    table = comparison([(["seed=1"], tmp_path / "01", 0), (["seed=2"], tmp_path / "02", 0)])
    assert table.splitlines()[-1] == "| 02 | 2 | 0.5000 | **best** |"
