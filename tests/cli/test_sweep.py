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

    def run_one(words: list[str]) -> int:
        made.append(words)
        if words[0] == "--resume":
            (Path(words[1]) / "manifest.json").write_text(json.dumps({"status": "finished", "minutes": 3.0}))
            return 0
        given = dict(text.split("=", 1) for text in words[1:])
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
        (run / "manifest.json").write_text(
            json.dumps({"status": "finished", "minutes": 2.0, "loop": {"best_loss": None}})
        )
        (run / "config.yaml").touch()
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
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["01", "02", "sweep.json", "sweep.md"]
    assert [text for text in fake_runs[0] if "name=" in text] == ["name='01'"]
    capsys.readouterr()
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert f"{tmp_path / 'mine'} exists already" in errors and f"--resume {tmp_path / 'mine'}" in errors
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


@pytest.mark.parametrize("left", ["nothing", "no checkpoint", "a checkpoint"])
def test_a_killed_sweep_goes_on(
    left: str,
    fake_runs: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """kill -9 in the second of three runs; what that one has left differs."""
    make = module._run_one

    def killed(words: list[str]) -> int:
        if len(fake_runs) < 1:
            return make(words)
        if left != "nothing":
            run = tmp_path / "mine" / "02"
            (run / "checkpoints").mkdir(parents=True)
            (run / "config.yaml").touch()
            if left == "a checkpoint":
                (run / "checkpoints" / "step-00000002").mkdir()
        raise KeyboardInterrupt  # stands for a kill: nothing after the run is carried out

    grid = ["--sweep", "trainer.learning_rate=0.1,0.2,0.4"]
    words = ["train", "quickstart", f"output_dir={tmp_path}", "name=mine", *grid]
    with monkeypatch.context() as patched:
        patched.setattr(module, "_run_one", killed)
        assert main(words) == 130
    table = (tmp_path / "mine" / "sweep.md").read_text()
    assert table.count("not finished") == 2 and "| 01 | 0.1 |" in table
    capsys.readouterr()
    resume = ["train", "--resume", str(tmp_path / "mine")]
    monkeypatch.setattr(module.Run, "open", lambda path: module.Run(path, None))
    assert main(resume) == 0
    output = capsys.readouterr()
    begun = int(left == "a checkpoint")
    assert f"1 of 3 runs are finished, {begun} are resumed, {2 - begun} are made" in output.err
    second = tmp_path / "mine" / "02"
    assert (fake_runs[1] == ["--resume", str(second)]) == (left == "a checkpoint")
    assert ("starts again" in output.err) == (left == "no checkpoint")
    assert len(fake_runs) == 3 and "not finished" not in output.out
    assert main(resume) == 0 and len(fake_runs) == 3, "nothing is left to do"
    assert main([*resume, "seed=3"]) == 2


def test_a_sweep_goes_on_only_as_it_began(
    fake_runs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "quickstart", f"output_dir={tmp_path}", "name=mine", "--sweep", "trainer.learning_rate=0.1"]
    assert main(words) == 0
    plan = tmp_path / "mine" / "sweep.json"
    content = json.loads(plan.read_text())
    content["configs"][0]["seed"] = 77
    plan.write_text(json.dumps(content))
    assert main(["train", "--resume", str(tmp_path / "mine")]) == 2
    assert "has changed since the sweep began: seed: 77 -> " in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", str(tmp_path / "mine")]) == 2
    assert "was started in another directory" in capsys.readouterr().err
    plan.write_text("{}")
    assert main(["train", "--resume", str(tmp_path / "mine")]) == 3
