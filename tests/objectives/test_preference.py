"""Preference steps: shared prompts equal separate ones, splits of a step agree, and the first step is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from preference_runs import PreferenceRun, apart, double, made_groups

from finetune.config.schema import CpoConfig, DpoConfig, OrpoConfig, PreferenceConfig, SimpoConfig
from finetune.data.batches import padding_batch
from finetune.data.groups import Groups, answer_tokens, collate_groups, pairs_of
from finetune.errors import CheckError
from finetune.model.forward import logits
from finetune.objectives.preference import LARGEST_REWARD, Preference

# Prompts shorter and longer than the window of 128 tokens, in one sequence and in several.
GROUPS = [*made_groups(2), *made_groups(1, answers=5, prompts=(140, 160), seed=4), *made_groups(1, prompts=(3, 5))]
CONFIGS = [DpoConfig(add={"sft": 0.5}), OrpoConfig(), SimpoConfig(), CpoConfig()]
NOISE = 1e-5  # of float32 sums in another order, relative to the largest gradient


def test_pairs_of_scores() -> None:
    assert pairs_of([0.2, 0.9, 0.2, 0.5], "best_worst") == [(1, 0)]
    assert pairs_of([0.2, 0.9, 0.2], "all") == [(1, 0), (1, 2)]
    assert pairs_of([1.0, 1.0], "all") == pairs_of([1.0, 1.0], "best_worst") == []
    with pytest.raises(ValueError, match="listwise"):
        pairs_of([1.0, 0.0], "listwise")


def test_groups_leave_out_answers_in_no_pair() -> None:
    examples = [answer for answers, _ in GROUPS for answer in answers]
    groups = Groups.of(examples, [0, 2, 4, 9], "best_worst")
    assert groups.members == ((0, 1), (2, 3), (4, 5), (9, 10)) and set(groups.pairs) == {((0, 1),)}
    shared, separate = (groups.lengths(examples, share_prompts=share) for share in (True, False))
    saved = [many - one for one, many in zip(shared, separate, strict=True)]
    assert saved == [examples[numbers[0]].shared for numbers in groups.members]


def test_the_tokens_of_answers_are_found_in_either_layout() -> None:
    """The first token of every answer is predicted from the last of its prompt."""
    shared, separate = (collate_groups([GROUPS[:2], GROUPS[2:]], share_prompts=share) for share in (True, False))
    one, other = answer_tokens(shared), answer_tokens(separate)
    wanted = [answer.ids[answer.shared :] for answers, _ in GROUPS for answer in answers]
    for tokens, batch in ((one, shared), (other, separate)):
        assert tokens.targets.tolist() == [token for ids in wanted for token in ids]
        assert tokens.num_answers == len(wanted) and batch.num_pairs == 7 == len(tokens.better)
        flat = batch.input_ids.flatten()
        firsts = [int((tokens.answer == number).nonzero()[0]) for number in range(len(wanted))]
        prompts = [answer.ids[answer.shared - 1] for answers, _ in GROUPS for answer in answers]
        assert flat[tokens.before[firsts]].tolist() == prompts
    assert torch.equal(one.better, other.better) and torch.equal(one.worse, other.worse)
    assert shared.num_tokens < separate.num_tokens


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_shared_prompts_equal_separate_ones(config: PreferenceConfig, checkpointed: bool, tiny_base: Path) -> None:
    """Value and every gradient; one token of a prompt changed for one answer alone would show."""
    shared, separate = (PreferenceRun(tiny_base, config, checkpointed=checkpointed) for _ in range(2))
    one = shared([collate_groups([GROUPS])])
    other = separate([collate_groups([[group]], share_prompts=False) for group in GROUPS])
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert apart(shared.gradients, separate.gradients) < NOISE
    for name in one.terms.keys() - {"balance_loss", "router_z_loss"}:  # means over computed tokens, which differ
        assert one.terms[name] == pytest.approx(other.terms[name], rel=1e-4, abs=1e-5), name
    changed = PreferenceRun(tiny_base, config)
    answers, pairs = GROUPS[0]
    answers[1].ids[3] += 1
    try:
        changed([collate_groups([[group]], share_prompts=False) for group in GROUPS])
    finally:
        answers[1].ids[3] -= 1
    assert pairs and apart(changed.gradients, separate.gradients) > 10 * NOISE


def test_a_step_does_not_depend_on_how_it_is_split(tiny_base: Path) -> None:
    whole, parts = (PreferenceRun(tiny_base, CONFIGS[0]) for _ in range(2))
    one = whole([collate_groups([[group] for group in GROUPS])])
    other = parts([collate_groups([GROUPS[:1]]), collate_groups([GROUPS[1:]]), padding_batch()])
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert apart(whole.gradients, parts.gradients) < NOISE
    batch = collate_groups([[group] for group in GROUPS])
    assert [part.num_pairs for part in batch.parts(3)] == [2, 4, 1], "sequences are divided, records are not"
    split = PreferenceRun(tiny_base, CONFIGS[0])
    split.step.parts = 3
    assert split([batch]).loss == pytest.approx(one.loss, rel=1e-5)
    assert apart(split.gradients, whole.gradients) < NOISE


def test_log_probabilities_are_the_models(tiny_base: Path) -> None:
    """Against log-softmax of whole sequences' logits in float64, of model and reference."""
    run = PreferenceRun(tiny_base, DpoConfig(beta=1.0))
    groups = GROUPS[:1]
    answers, _ = groups[0]

    def logp(number: int) -> float:
        ids = torch.from_numpy(answers[number].ids).long()
        table = logits(run.base.model, ids).double().log_softmax(-1)
        return sum(float(table[place - 1, ids[place]]) for place in range(answers[number].shared, len(ids)))

    with torch.no_grad():
        found = [logp(number) for number in range(2)]
        with run.adapter.disabled():
            reference = [logp(number) for number in range(2)]
    stats = run([collate_groups([groups])])
    assert stats.terms["logps/chosen"] == pytest.approx(found[0], rel=1e-6)
    assert stats.terms["logps/rejected"] == pytest.approx(found[1], rel=1e-6)
    assert stats.terms["rewards/chosen"] == pytest.approx(found[0] - reference[0], abs=1e-4)
    assert stats.terms["rewards/margins"] == pytest.approx(found[0] - reference[0] - found[1] + reference[1], abs=1e-4)
    wanted = -torch.nn.functional.logsigmoid(double([stats.terms["rewards/margins"]])).item()
    assert stats.loss == pytest.approx(wanted, rel=1e-5)


def test_an_untrained_adapter_starts_at_zero_rewards(tiny_base: Path) -> None:
    run = PreferenceRun(tiny_base, DpoConfig(), shaken=False)
    stats = run([collate_groups([GROUPS])])
    assert stats.terms[LARGEST_REWARD] == 0.0
    assert "rewards exactly 0, loss 0.693147 (expected 0.693147)" in run.step.objective.check_first_step(stats.terms)


def test_a_wrong_start_is_refused(tiny_base: Path) -> None:
    run = PreferenceRun(tiny_base, DpoConfig())  # its adapter has changed something already
    with pytest.raises(CheckError, match="the first step is not where dpo starts: largest reward"):
        run.step.objective.check_first_step(run([collate_groups([GROUPS])]).terms)
    with pytest.raises(CheckError, match="the loss is 25"):
        Preference(DpoConfig(loss="ipo")).check_first_step({LARGEST_REWARD: 0.0, "loss": 24.9})
    assert "orpo has no reference" in Preference(OrpoConfig()).check_first_step({})
