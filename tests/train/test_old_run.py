"""A run directory that v0.1.0 (af10aae) wrote still opens, resumes, evaluates and exports.

`fixtures/run_v0_1_0/finished` is a whole run without its checkpoints and report, `stopped` the same run killed after its
first checkpoint. Eight steps on the tiny base, rank 1, on the rows of `make_workplace`; both ended up with paths relative
to the directory that they ran in, and with the keys of that version.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import make_workplace, metrics_of

from finetune.adapters.store import AdapterFile
from finetune.cli.main import main
from finetune.model.tiny import write_tiny_base

OLD = Path(__file__).parents[1] / "fixtures" / "run_v0_1_0"
WEIGHTS = "adapter/adapter_model.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and rows as they lay when the runs were made."""
    directory = tmp_path_factory.mktemp("old")
    write_tiny_base(directory / "base")
    return make_workplace(directory, directory / "base")


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_the_base_is_rebuilt_with_the_same_identity(here: Path) -> None:
    from finetune.model.checkpoint import Checkpoint
    from finetune.model.identity import checkpoint_identity

    facts = json.loads((OLD / "finished" / "adapter" / "finetune.json").read_text())
    assert checkpoint_identity(Checkpoint.open(here / "base")) == facts["base_identity"]


def test_a_stopped_run_is_resumed_to_the_same_end(
    here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(OLD / "stopped", run)
    assert main(["train", "--resume", str(run)]) == 0
    said = capfd.readouterr().err
    assert "trainer.micro_steps" in said and "trainer.gradient_accumulation_steps" in said
    for new, old in zip(metrics_of(run), metrics_of(OLD / "finished"), strict=True):
        assert new.keys() >= old.keys()
        for key in old:
            wanted = pytest.approx(old[key], rel=1e-3) if isinstance(old[key], float) else old[key]
            assert new[key] == wanted, f"step {old['step']}: {key}"
    mine, theirs = load_file(run / WEIGHTS), load_file(OLD / "finished" / WEIGHTS)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():  # Adam's steps are of the rate's size whatever the gradient's: few may part
        apart = (mine[name] - tensor).abs()
        assert (apart > 1e-3).float().mean() < 0.01, name
        assert torch.equal(mine[name] == 0, tensor == 0), name


def test_a_finished_run_is_evaluated_exported_and_reported(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "finished"
    shutil.copytree(OLD / "finished", run)
    shutil.copytree(OLD / "stopped" / "checkpoints", run / "checkpoints")
    assert main(["evaluate", str(run), "--base", "base", "--retention", "0"]) == 0
    old = json.loads((OLD / "finished" / "evaluation.json").read_text())
    figures = json.loads((run / "evaluation" / "summary.json").read_text())
    test = next(suite for suite in figures["suites"] if suite["suite"] == "test")
    for who, when in (("base", "before"), ("adapter", "after")):
        assert test["loss"][who]["value"] == pytest.approx(old[when]["loss"], rel=1e-4)
    assert main(["report", str(run)]) == 0 and (run / "report.html").stat().st_size > 10_000
    assert main(["export", str(run), "--to", "peft", "--base", "base", "--out", str(tmp_path / "peft")]) == 0
    written, old_weights = load_file(tmp_path / "peft" / "adapter_model.safetensors"), load_file(run / WEIGHTS)
    assert written.keys() == old_weights.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in old_weights.items())
    assert AdapterFile.open(run / "adapter").sites
