"""The shipped recipes fit their GPU, train the channels that they name, and the debug recipes run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.recipes import list_recipes
from finetune.data.dataset import load_split
from finetune.data.harmony.tokenizer import harmony_encoding
from finetune.data.packing import pack
from finetune.estimate.fit import Budget
from finetune.estimate.inputs import find_base
from finetune.estimate.report import make_estimate

LARGE = [name for name in list_recipes() if name.endswith("20b")]


@pytest.mark.parametrize("domain", ["legal", "medical", "creative"])
def test_each_domain_has_each_size(domain: str) -> None:
    tiny = "quickstart" if domain == "legal" else f"{domain}_tiny"
    for name, base in ((tiny, "./base/tiny"), (f"{domain}_20b", "gpt-oss-20b"), (f"{domain}_120b", "gpt-oss-120b")):
        config = compose(name).config
        assert config.model.path.removeprefix("openai/") == base
        assert any(f"shipped://{domain}/" in source.path for source in config.data.train.values())


@pytest.mark.parametrize("name", LARGE)
def test_large_ones_fit_80_gb_and_not_much_less(name: str) -> None:
    composed = compose(name)
    facts = find_base(composed.config.model.path)
    assert facts is not None

    def fits(size: float) -> bool:
        budget = Budget.of_card(size)
        estimate = make_estimate(composed.config, name, facts, budget, gpus=1, plan=False, tflops=None)
        return estimate.fit.fits

    assert fits(80) and not fits(14 if "_20b" in name else 64)


def test_medical_trains_thinking_and_answer() -> None:
    split = load_split(compose("medical_tiny").config.data, "validation")
    record, sample = split.records[0], split.examples[0]
    trained = harmony_encoding().decode_utf8(sample.ids[sample.weights > 0].tolist())
    thinking, answer = record.messages[-1].thinking, record.messages[-1].content
    assert trained.startswith("<|channel|>analysis<|message|>") and f"{thinking}<|end|>" in trained
    assert trained.endswith(f"final<|message|>{answer}<|return|>")


def test_overfit_one_batch_is_one_batch() -> None:
    config = compose("debug/overfit_one_batch").config
    split = load_split(config.data, "train")
    rows = pack([len(sample.ids) for sample in split.examples], config.data.max_length, np.random.default_rng(0))
    assert (len(split.examples), len(rows)) == (7, 1)


@pytest.mark.slow
def test_debug_recipes_run(tmp_path: Path) -> None:
    """On the pretrained base: seven clauses are learnt by heart; a profile has its eight steps."""
    assert main(["base", "tiny", str(tmp_path / "tiny")]) == 0
    torch.set_num_threads(1)
    common = [f"model.path={tmp_path / 'tiny'}", f"output_dir={tmp_path}"]
    for name in ("overfit_one_batch", "profile"):
        assert main(["train", name, f"name={name}", *common]) == 0
    steps = [json.loads(line) for line in (tmp_path / "overfit_one_batch" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if line["kind"] == "step"]
    assert len(losses) == 40 and losses[0] > 5 and losses[-1] < losses[0] / 20, losses
    steps = [json.loads(line) for line in (tmp_path / "profile" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == list(range(1, 9))
