"""A run directory that v0.1.0 (af10aae) wrote still opens, resumes, evaluates and exports.

`fixtures/run_v0_1_0/finished` is a whole run without its checkpoints and report, `stopped` the same run killed after
its first checkpoint: eight steps on the tiny base, rank 1, on the rows of `make_workplace`, with paths relative to the
directory that they ran in and with the keys of that version.
"""

from __future__ import annotations

import json
import os
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

MADE_ON = ("AuthenticAMD", "AVX512", "2.13.0", "1")
RECIPE = """# @package _global_
defaults:
  - override /model: tiny
  - override /data: own
model: {path: base}
data:
  train: {mine: {path: train.jsonl}}
  validation: {mine: {path: validation.jsonl}}
  test: {mine: {path: test.jsonl}}
  max_length: 700
adapter: {attention: {rank: 1, alpha: 2.0, targets: [q_proj, o_proj]}, experts: {rank: 1, alpha: 2.0}}
trainer: {epochs: 2, max_steps: 8, gradient_accumulation_steps: 2, learning_rate: 1.0e-2}
evaluate: {every_steps: 4, routing_examples: 4}
save: {every_steps: 4, keep: 1}
export: {read_back: never}
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and records as they were when the runs were made."""
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
    assert "was written by version 0.1" in said and "13 key" in said
    assert_same_figures(run)


def assert_same_figures(run: Path) -> None:
    """Every figure of every step, and the adapter, equal v0.1.0's up to the rounding of eight steps."""
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


def fingerprint() -> tuple[str, ...]:
    """Versions and settings that determine a run's bits."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vendor = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("vendor_id")), "")
    chosen = any(name in os.environ for name in ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"))
    capability = "chosen" if chosen else torch.backends.cpu.get_cpu_capability()
    return vendor, capability, torch.__version__.partition("+")[0], str(torch.get_num_threads())


def test_the_same_run_now_gives_the_same_figures_and_on_the_same_machine_the_same_bits(
    here: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    assert main(["train", str(tmp_path / "small.yaml"), f"output_dir={tmp_path}", "name=run"]) == 0
    assert_same_figures(tmp_path / "run")
    if fingerprint() != MADE_ON:
        pytest.skip(f"figures agree; bits are compared on {MADE_ON} only, this is {fingerprint()}")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (OLD / "finished" / WEIGHTS).read_bytes()
    old, new = metrics_of(OLD / "finished"), metrics_of(tmp_path / "run")
    assert [{key: line[key] for key in before} for before, line in zip(old, new, strict=True)] == old


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
