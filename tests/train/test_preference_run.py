"""Whole preference runs of the command on a small set of pairs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Train, assert_same_run, manifest_of, metrics_of, signal_after

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.errors import ConfigError
from finetune.objectives import preference

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ("Licence", "Audit", "Governing law", "Term", "Notice", "Assignment", "Warranty", "Insurance")


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """Overrides of the small recipe: pairs of clause types in place of its records."""
    overrides = ["objective=dpo", "evaluate.test_examples=4", "trainer.max_steps=4"]
    for name, count in (("train", 24), ("validation", 4), ("test", 4)):
        records = [
            {
                "prompt": f"Clause {number} of the {name} contract says: {WORDS[number % 8]}. Name its type.",
                "chosen": WORDS[number % 8],
                "rejected": WORDS[(number + 3) % 8],
            }
            for number in range(count)
        ]
        path = tmp_path / f"{name}_pairs.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        overrides.append(f"data.{name}.mine.path={path}")
    return overrides


def test_a_resumed_preference_run_equals_the_uninterrupted_one(
    train: Train, pairs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, whole = train(*pairs, name="whole")
    said = capsys.readouterr().err
    assert code == 0 and "pairs: 24 of 24 records" in said and "prompts are computed once" in said
    assert "first step: rewards exactly 0, loss 0.693147 (expected 0.693147)" in said
    assert manifest_of(whole)["audit"][1] == "first step: rewards exactly 0, loss 0.693147 (expected 0.693147)"
    with monkeypatch.context() as patch:
        signal_after(patch, 2, signal.SIGTERM)
        code, stopped = train(*pairs, name="stopped")
    assert code == 143
    assert main(["train", "--resume", str(stopped)]) == 0
    assert_same_run(whole, stopped)
    steps = [entry for entry in metrics_of(whole) if "rewards/margins" in entry]
    assert len(steps) == 4 and steps[0]["rewards/margins"] == 0 != steps[-1]["rewards/margins"]
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert evaluation["suites"][0]["pairs"]["pairs"] == 4


def test_data_and_objective_have_to_fit(train: Train, pairs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("objective=dpo", name="records")[0] == 2
    assert "objective.kind is dpo" in capsys.readouterr().err
    assert train(*pairs[1:], name="pairs")[0] == 2
    assert "preference_20b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.loss.final=0.5"], "data.loss.final is 0.5, but dpo compares log-probabilities"),
        (["data.pairs=listwise"], "data.pairs is listwise, but dpo compares pairs"),
        (["objective.loss=sft"], "objective.loss is sft alone, which compares nothing"),
        (["objective.add={sigmoid: 1.0}"], "objective.add has sigmoid once more"),
        (["objective.loss=hinge", "objective.label_smoothing=0.1"], "but hinge has no use for it"),
        (["adapter.attention.dropout=0.1"], "which the reference does not have"),
        (["adapter.init_from=runs/x/adapter"], "the reference is the base without any adapter"),
    ],
)
def test_wrong_combinations_are_refused_with_the_reason(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("preference_tiny", overrides)
    assert words in str(caught.value)


def test_dropout_needs_no_reference_to_be_allowed() -> None:
    overrides = ["adapter.attention.dropout=0.1", "objective.reference=none"]
    assert compose("preference_tiny", overrides).config.objective.kind == "dpo"
    assert compose("preference_tiny", ["objective=cpo", "adapter.attention.dropout=0.1"]).config.trainer.learning_rate


def test_an_edited_configuration_is_not_resumed(
    train: Train, pairs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        signal_after(patch, 1, signal.SIGTERM)
        code, stopped = train(*pairs, "evaluate.every_steps=null", name="edited")
    assert code == 143
    file = stopped / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.09").replace("seed: 0", "seed: 1"))
    assert main(["train", "--resume", str(stopped)]) == 2
    said = capsys.readouterr().err
    assert "was edited since the run began" in said
    assert "seed: 0 -> 1" in said and "trainer.learning_rate: 0.01 -> 0.09" in said
    manifest = json.loads((stopped / "manifest.json").read_text())
    manifest.pop("config")  # as runs of 0.1 were written
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    file.write_text(text)
    assert main(["train", "--resume", str(stopped)]) == 0


def test_after_a_skipped_first_step_the_next_one_is_checked(
    train: Train, pairs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No update was made, so rewards are still 0."""
    losses, calls = preference.pair_losses, []

    def first_is_nan(*given: Any) -> torch.Tensor:
        calls.append(given)
        return losses(*given) * (float("nan") if len(calls) == 1 else 1.0)

    monkeypatch.setattr(preference, "pair_losses", first_is_nan)
    code, run = train(*pairs, "trainer.on_nonfinite=skip", "evaluate.every_steps=null", name="skipped")
    assert code == 0 and [line["step"] for line in metrics_of(run) if line["kind"] == "skipped"] == [1]
    assert capsys.readouterr().err.count("first step: rewards exactly 0") == 1
