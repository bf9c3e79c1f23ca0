"""Four steps of every DPO loss against TRL's DPOTrainer, whose figures scripts/trl_preference.py has written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from preference_runs import PAIRS_PER_STEP, PreferenceRun, made_groups

from finetune.config.schema import DpoConfig
from finetune.data.groups import collate_groups

GOLDEN = json.loads(Path(__file__).with_name("trl_golden.json").read_text())
# TRL's float32 sums run over padded sequences in another order; 0.46 of the limit was the most, under SSE2 too.
LIMIT = 1e-5  # relative for figures above 1, such as log-probabilities of -100
# Adam turns the sign of a gradient that is rounding alone into a whole update: under SSE2's order of sums ipo's later
# steps differ by 2.4e-4.
LATER_LIMIT = {"ipo": 1e-3}


def config_of(name: str) -> DpoConfig:
    first, *added = name.split("+")
    smoothing = GOLDEN["smoothing"].get(name, 0.0)
    return DpoConfig(loss=first, add=dict.fromkeys(added, 1.0), label_smoothing=smoothing)  # type: ignore[arg-type]


def figures(base: Path, config: DpoConfig, share_prompts: bool) -> list[dict[str, float]]:
    run, groups = PreferenceRun(base, config), made_groups(4 * PAIRS_PER_STEP)
    steps = []
    for start in range(0, len(groups), PAIRS_PER_STEP):
        sequences = [[group] for group in groups[start : start + PAIRS_PER_STEP]]
        steps.append(run([collate_groups(sequences, share_prompts=share_prompts)]).terms)
    return steps


def furthest(found: list[dict[str, float]], wanted: list[dict[str, float]], later: float = LIMIT) -> float:
    """The largest difference of a figure, as a share of what it may be; `later` is the limit after the first step."""
    return max(
        abs(ours[name] - theirs[name]) / max(1.0, abs(theirs[name])) / (later if step else LIMIT)
        for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True))
        for name in theirs
    )


@pytest.mark.parametrize("name", GOLDEN["steps"])
def test_four_steps_are_those_of_trl(name: str, tiny_base: Path) -> None:
    found = figures(tiny_base, config_of(name), share_prompts=True)
    assert furthest(found, GOLDEN["steps"][name], LATER_LIMIT.get(name, LIMIT)) <= 1


def test_another_beta_or_a_sum_for_a_mean_is_noticed(tiny_base: Path) -> None:
    wanted = GOLDEN["steps"]
    other_beta = figures(tiny_base, replace(config_of("sigmoid"), beta=0.11), share_prompts=True)
    assert furthest(other_beta, wanted["sigmoid"]) > 100
    assert furthest(figures(tiny_base, config_of("sigmoid"), True), wanted["sigmoid_norm"]) > 100
