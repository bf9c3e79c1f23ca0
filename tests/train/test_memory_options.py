"""Memory-saving options through the command: messages, records, refusals, and resuming with them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import Train, assert_same_run, manifest_of, metrics_of, signal_after

from finetune.cli.main import main
from finetune.train.checkpoint import load_newest

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = (
    "model.expert_storage=nf4",
    "model.attention_storage=nf4",
    "model.embedding_on_cpu=true",
    "adapter.dtype=bfloat16",
    "trainer.optimizer=adamw_8bit",
    "trainer.optimizer_states_on_cpu=true",
    "trainer.gradient_dtype=bfloat16",
    "trainer.max_steps=5",
)


def test_a_run_with_all_options_resumes_bit_for_bit_and_records_them(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, whole = train(*EVERYTHING, "export.read_back=always", name="whole")
    assert code == 0 and manifest_of(whole)["read_back"]["conclusive"] is True
    printed = capsys.readouterr().err
    with monkeypatch.context() as patch:
        signal_after(patch, 2, signal.SIGTERM)
        code, stopped = train(*EVERYTHING, name="stopped")
    assert code == 143
    assert main(["train", "--resume", str(stopped)]) == 0
    assert_same_run(whole, stopped)
    assert metrics_of(whole)[-1]["step"] == 5
    manifest, report = manifest_of(whole), (whole / "report.md").read_text()
    line = manifest["optimizer"]
    said = ("adamw_8bit (bitsandbytes ", "parameters bfloat16, updates rounded stochastically", "states in host memory")
    for words in said:
        assert words in line and line in printed and line in report
    formats = {part["part"]: part["format"] for part in manifest["base"]["storage"]}
    assert formats["expert weights"] == formats["attention weights"] == "nf4"
    assert formats["input embedding"] == "bfloat16"
    assert manifest["base"]["held_as"].keys() == {"experts", "attention"}
    assert "**experts were rounded to nf4**" in report and "stored in NF4" in printed
    _, checkpoint = load_newest(whole / "checkpoints")
    assert {tensor.dtype for tensor in checkpoint.adapter.values()} == {torch.bfloat16}
    moment = checkpoint.optimizer["model.layers.1.mlp.experts.gate_up_b/state1"]
    assert moment.dtype == torch.uint8 and moment.count_nonzero()
    written = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_an_initial_adapter_of_another_storage_format_is_logged(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = train("model.expert_storage=nf4", "trainer.max_steps=2", name="first")
    capsys.readouterr()
    begin = (f"adapter.init_from={first / 'adapter'}", "trainer.max_steps=1")
    code, _ = train(*begin, "adapter.dtype=bfloat16", name="second")
    errors = capsys.readouterr().err
    assert code == 0
    assert "was trained over experts in nf4" in errors and "the checkpoint's own values" in errors
    assert "rounded to the recipe's adapter.dtype" in errors
    code, _ = train(*begin, "model.expert_storage=nf4", name="third")
    errors = capsys.readouterr().err
    assert code == 0 and "was trained over" not in errors and "rounded to the recipe's" not in errors


REFUSED = {
    ("trainer.optimizer=paged_adamw_8bit", "model.device=cpu"): (2, "pages nothing"),
    ("trainer.optimizer=paged_adamw",): (5, "paged states are CUDA's"),
    ("trainer.optimizer=paged_adamw", "trainer.optimizer_states_on_cpu=true"): (2, "already move between GPU and host"),
    ("trainer.gradient_dtype=bfloat16",): (2, "adapter.dtype is float32"),
    ("trainer.optimizer=adamw8bit",): (2, "adamw_8bit"),
    ("model.attention_storage=mxfp4",): (2, "compute"),
}


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_unsupported_options_are_refused_before_a_run_directory_exists(
    train: Train, overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if "model.device=cpu" not in overrides and torch.cuda.is_available():
        pytest.skip("with a GPU this is no mistake")
    code, run = train(*overrides)
    wanted, words = REFUSED[overrides]
    assert code == wanted and words in capsys.readouterr().err
    assert not Path(run).exists()
