"""The estimate of a step against the bytes that a real step allocates, with the peak at one moment or another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tracked_step import SIZES, measure, recipe, write_base

from finetune.config.schema import RunConfig
from finetune.estimate.inputs import StepProfile, find_base, step_profile
from finetune.estimate.memory import MemoryEstimate, estimate_memory

TOLERANCE = 0.05

EXPERTS, ATTENTION, HEAD = "backward of a layer's experts", "backward of a layer's attention", "loss head"
NARROW = {"adapter.dtype": "bfloat16", "trainer.gradient_dtype": "bfloat16", "trainer.optimizer": "adamw_8bit"}
STORAGES = {"model.attention_storage": "nf4", "model.expert_storage": "nf4"}
CASES = {
    "checkpointed": ("experts", EXPERTS, {}),
    "one expert at a time": ("experts", EXPERTS, {"chunk": 1, "tokens": 768}),
    "all experts at once": ("experts", EXPERTS, {"chunk": 16}),
    "nothing recomputed": ("experts", EXPERTS, {"checkpointing": False}),
    "bfloat16, accumulated": ("experts", EXPERTS, {"dtype": "bfloat16", "gradient_accumulation_steps": 2}),
    "high ranks": ("experts", EXPERTS, {"tokens": 64, "ranks": (32, 32), "chunk": 1}),
    "several sequences, attention only": ("experts", EXPERTS, {"tokens": 256, "sequences": 2, "ranks": (4, 0)}),
    "several sequences, experts only": ("experts", EXPERTS, {"tokens": 256, "sequences": 2, "ranks": (0, 4)}),
    "narrow adapter": (
        "experts",
        EXPERTS,
        {"ranks": (16, 16), "dtype": "bfloat16", "options": NARROW},
    ),
    "other storages": ("experts", EXPERTS, {"dtype": "bfloat16", "options": STORAGES}),
    "many heads": ("attention", ATTENTION, {"tokens": 1024}),
    "many heads in bfloat16": ("attention", ATTENTION, {"tokens": 1024, "dtype": "bfloat16"}),
    "large vocabulary": ("vocabulary", HEAD, {}),
    "large vocabulary in bfloat16": ("vocabulary", HEAD, {"dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_base(root / name, name) for name in SIZES}


def reference_step(config: RunConfig, directory: Path, busiest_chunk: float) -> StepProfile:
    """The step that `measure` ran: the kernels of a freshly loaded base, examples of half a sequence, its routing."""
    info = find_base(str(directory))
    assert info is not None
    step = step_profile(config, info.arch, on_gpu=False)
    sample = config.data.max_length // 2
    kernels = {"attention_kernel": "reference", "expert_kernel": "reference"}
    return replace(step, longest_example=sample, busiest_chunk=busiest_chunk, **kernels)


def estimated(step: StepProfile, directory: Path) -> MemoryEstimate:
    info = find_base(str(directory))
    assert info is not None
    return estimate_memory(info.arch, step)


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_five_per_cent(case: str, bases: dict[str, Path], one_thread: None) -> None:
    name, moment, settings = CASES[case]
    config = recipe(bases[name], **settings)
    measured = measure(bases[name], config)
    step = reference_step(config, bases[name], measured.busiest_chunk)
    estimate = estimated(step, bases[name])
    assert estimate.step_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE)
    assert estimate.peak_moment == moment


WRONG = {
    "chunk": {"experts_per_chunk": 2},
    "dtype": {"compute_bytes": 2},
    "rank": {"expert_rank": 16},
    "tokens": {"sequence_tokens": 384},
    "checkpointing": {"checkpointing": False},
    "routing": {"busiest_chunk": 1.0},
}


def test_other_settings_are_not_within_it(bases: dict[str, Path], one_thread: None) -> None:
    """Negative control: the same step, estimated with one setting wrong at a time."""
    config = recipe(bases["experts"])
    measured = measure(bases["experts"], config)
    right = reference_step(config, bases["experts"], measured.busiest_chunk)
    for setting, wrong in WRONG.items():
        off = estimated(replace(right, **wrong), bases["experts"]).step_bytes / measured.peak_bytes - 1
        assert abs(off) > TOLERANCE, setting


@pytest.mark.parametrize("trained_share", [0.1, 0.6])
def test_context_tokens_need_no_logits(trained_share: float, bases: dict[str, Path], one_thread: None) -> None:
    config = recipe(bases["vocabulary"])
    measured = measure(bases["vocabulary"], config, trained_share)
    step = reference_step(config, bases["vocabulary"], measured.busiest_chunk)
    fewer = estimated(replace(step, trained_share=trained_share), bases["vocabulary"])
    assert fewer.step_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE)
    assert estimated(step, bases["vocabulary"]).step_bytes > 1.3 * measured.peak_bytes
