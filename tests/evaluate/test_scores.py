"""Held-out loss and label scores against a plain loop over transformers' own model, and the test set's figures."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import nats_noise
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.conversation import Conversation
from finetune.data.dataset import Split, load_split
from finetune.data.harmony.render import Example, render_answer, render_prompt
from finetune.data.sources import Record
from finetune.errors import InputError
from finetune.evaluate.evalset import EvalSet, label_set, stratified_subset
from finetune.evaluate.labels import LabelScores, score_labels
from finetune.evaluate.likelihood import Group, held_out_loss
from finetune.evaluate.statistics import bootstrap_ratio_interval, wilson_interval
from finetune.evaluate.summary import measure_test_set
from finetune.model.build import Base, build_base
from finetune.model.checkpoint import Checkpoint

CONFIG = DataConfig(
    train={},
    test={"cuad": SourceConfig(path="shipped://legal/cuad_clause_type.jsonl.gz", where={"split": "test"})},
    max_length=1024,
    reasoning_effort="low",
)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return build_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, experts_per_chunk=16)


@pytest.fixture(scope="module")
def reference(tiny_base: Path) -> GptOssForCausalLM:
    """transformers' own model and attention on the dequantised weights, float32."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    )
    return model.float().eval()


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split(CONFIG, "test")


SHOWS = 1e-2  # nats by which an answer after another prompt, or another answer, is off at the least


def loss_noise(base: Base, examples: Sequence[Example]) -> float:
    """What rounding explains of an example's nats."""
    trained = max(np.count_nonzero(example.weights) for example in examples)
    return nats_noise(base.model, lambda: held_out_loss(base.model, examples, 1024).nll, trained)


@torch.no_grad()
def reference_log_probabilities(reference: GptOssForCausalLM, ids: list[int]) -> torch.Tensor:
    """log p(ids[t] | ids[:t]) for t from 1, float64 [T - 1], from one plain unpacked forward pass."""
    logits = reference(input_ids=torch.tensor([ids])).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


# ---- held-out loss --------------------------------------------------------------------------------------------------


def test_held_out_loss_equals_one_example_at_a_time(base: Base, reference: GptOssForCausalLM, split: Split) -> None:
    examples = split.examples[:5]
    scored = held_out_loss(base.model, examples, 1024)  # packs several into a row
    limit = loss_noise(base, examples)
    assert min(len(example.ids) for example in examples) > 128  # beyond the sliding window
    for number, example in enumerate(examples):
        log_probability = reference_log_probabilities(reference, example.ids.tolist())
        expected = -(log_probability * torch.from_numpy(example.weights[1:]).double()).sum().item()
        assert abs(scored.nll[number] - expected) <= limit < SHOWS / 20
        assert scored.weight[number] == example.weights.sum()
    assert scored.mean == pytest.approx(scored.nll.sum() / sum(s.weights.sum() for s in examples))


def test_held_out_loss_counts_weights(base: Base, split: Split) -> None:
    example = split.examples[0]
    doubled = dataclasses.replace(example, weights=example.weights * 2)
    alone, both = (held_out_loss(base.model, [s], 1024) for s in (example, doubled))
    assert both.nll[0] == pytest.approx(2 * alone.nll[0]) and both.mean == pytest.approx(alone.mean)


def test_held_out_loss_stops_between_batches(base: Base, split: Split) -> None:
    def leave() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        held_out_loss(base.model, split.examples[:2], 1024, between_batches=leave)


# ---- labels ---------------------------------------------------------------------------------------------------------


def label_noise(base: Base, records: Sequence[Record], labels: tuple[str, ...]) -> float:
    """What rounding explains of a label's nats."""
    tokens = max(len(render_answer(label)) for label in labels)
    return nats_noise(base.model, lambda: score_labels(base.model, records, labels, CONFIG).log_likelihood, tokens)


@pytest.fixture(scope="module")
def limit(base: Base, split: Split, scored: LabelScores) -> float:
    """For the scores of the records of `scored`."""
    found = label_noise(base, split.records[:3], scored.labels)
    assert found < SHOWS / 20
    return found


@pytest.fixture(scope="module")
def scored(base: Base, split: Split) -> LabelScores:
    """Three records against all 24 labels."""
    labels = label_set(split.records)
    assert labels is not None
    return score_labels(base.model, split.records[:3], labels, CONFIG)


def test_label_scores_equal_one_answer_at_a_time(
    scored: LabelScores, reference: GptOssForCausalLM, split: Split, limit: float
) -> None:
    assert len(scored.labels) == 24 and scored.log_likelihood.shape == (3, 24)
    for number, record in enumerate(split.records[:3]):
        prompt = render_prompt(record, CONFIG)
        assert len(prompt) > 200  # the sliding window is 128
        assert scored.labels[scored.right[number]] == record.answer
        for column in range(0, 24, 4):
            answer = render_answer(scored.labels[column])
            log_probability = reference_log_probabilities(reference, prompt + answer)[-len(answer) :]
            assert abs(scored.log_likelihood[number, column] - log_probability.sum().item()) <= limit
            assert abs(scored.shared[number] - log_probability[:3].sum().item()) <= limit  # the header


def test_a_label_after_another_prompt_scores_differently(
    scored: LabelScores, reference: GptOssForCausalLM, split: Split
) -> None:
    """The comparison above can fail: the prompt matters by far more than its tolerance."""
    answer = render_answer(scored.labels[0])
    wrong = reference_log_probabilities(reference, render_prompt(split.records[1], CONFIG) + answer)[-len(answer) :]
    assert abs(scored.log_likelihood[0, 0] - wrong.sum().item()) > SHOWS


def test_records_scored_together_equal_records_scored_alone(
    base: Base, split: Split, scored: LabelScores, limit: float
) -> None:
    """Three records share a sequence; each alone gives the same scores, and another record other ones."""
    alone = [
        score_labels(base.model, [record], scored.labels, CONFIG).log_likelihood[0] for record in split.records[:2]
    ]
    assert np.abs(alone - scored.log_likelihood[:2]).max() <= limit
    assert np.abs(alone[0] - scored.log_likelihood[1]).max() > SHOWS


def test_losses_of_packed_examples_equal_those_of_examples_alone(base: Base, split: Split) -> None:
    examples = split.examples[:3]
    together = held_out_loss(base.model, examples, 2048).nll
    alone = [held_out_loss(base.model, [example], 1024).nll[0] for example in examples]
    assert np.abs(together - alone).max() <= loss_noise(base, examples) < SHOWS / 20
    assert np.abs(together - np.roll(alone, 1)).max() > SHOWS


def test_answers_of_one_prompt_do_not_see_each_other(
    base: Base, split: Split, scored: LabelScores, limit: float
) -> None:
    pair = (scored.labels[1], scored.labels[17])
    records = [dataclasses.replace(split.records[0], answer=pair[0])]
    fewer = score_labels(base.model, records, pair, CONFIG).log_likelihood[0]
    assert np.abs(fewer - scored.log_likelihood[0, [1, 17]]).max() <= limit


def test_answers_that_begin_alike(base: Base, reference: GptOssForCausalLM, split: Split) -> None:
    """One answer being the start of another shares tokens with it; their ends still count."""
    labels = ("No-Solicit", "No-Solicit Of", "No-Solicit Of Employees")
    record = dataclasses.replace(split.records[0], answer="No-Solicit Of")
    scores = score_labels(base.model, [record], labels, CONFIG)
    limit = label_noise(base, [record], labels)
    prompt = render_prompt(record, CONFIG)
    for column, label in enumerate(labels):
        answer = render_answer(label)
        expected = reference_log_probabilities(reference, prompt + answer)[-len(answer) :].sum().item()
        assert abs(scores.log_likelihood[0, column] - expected) <= limit < SHOWS / 20
    assert scores.right.tolist() == [1]


def test_accuracy_counts_the_likeliest_answer() -> None:
    table = np.array([[-1.0, -2.0, -3.0], [-5.0, -4.0, -6.0], [-9.0, -8.0, -7.0], [-1.0, -2.0, -3.0]])
    scores = LabelScores(("a", "b", "c"), table, np.array([0, 1, 0, 0]), np.zeros(4))
    assert scores.accuracy == 0.75


def test_an_answer_outside_the_labels_is_named(base: Base, split: Split) -> None:
    with pytest.raises(InputError, match=r"cuad_clause_type\.jsonl\.gz:1: answer .* not among the 2 labels"):
        score_labels(base.model, split.records[:1], ("Yes", "No"), CONFIG)


@pytest.mark.parametrize(("prompt", "num_scored"), [([], 0), ([5, 6], 2)])
def test_a_prompt_that_predicts_nothing_is_refused(prompt: list[int], num_scored: int) -> None:
    """Its first token would otherwise be predicted by whatever precedes it in the sequence."""
    with pytest.raises(ValueError, match="predicts nothing"):
        Group(prompt, [[7]], num_scored)
    Group([*prompt, 8], [[7]], num_scored)


def records_with(answers: list[str | None]) -> list[Record]:
    return [Record(str(number), f"rows:{number}", Conversation(()), answer) for number, answer in enumerate(answers)]


def test_label_set() -> None:
    assert label_set(records_with(["b", "a", "b"])) == ("a", "b")
    assert label_set(records_with(["a", "b", None])) is None
    assert label_set(records_with(["a", "a"])) is None
    assert label_set([]) is None
    assert len(label_set(records_with([str(n) for n in range(64)])) or ()) == 64
    assert label_set(records_with([str(n) for n in range(65)])) is None


def test_stratified_subset_keeps_proportions(split: Split) -> None:
    chosen = stratified_subset(split.records, 300, seed=0)
    assert len(set(chosen)) == 300 and chosen == sorted(chosen)
    whole = Counter(record.answer for record in split.records)
    part = Counter(split.records[number].answer for number in chosen)
    for answer, count in whole.items():
        assert abs(part[answer] - 300 * count / len(split.records)) < 1


def test_stratified_subset_depends_on_the_seed_alone(split: Split) -> None:
    assert stratified_subset(split.records, 300, 0) == stratified_subset(split.records, 300, 0)
    assert stratified_subset(split.records, 300, 0) != stratified_subset(split.records, 300, 1)


@pytest.mark.parametrize("count", [None, 4, 10])
def test_stratified_subset_of_all(count: int | None) -> None:
    assert stratified_subset(records_with(["a", "a", None, "b"]), count, 0) == [0, 1, 2, 3]


def test_stratified_subset_rounds_by_largest_remainder() -> None:
    records = records_with(["a"] * 5 + ["b"] * 3 + [None] * 2)
    kinds = Counter(records[number].answer for number in stratified_subset(records, 4, 3))
    assert kinds == {"a": 2, "b": 1, None: 1}  # 2.0, 1.2 and 0.8


def test_a_record_of_several_turns_counts_once_in_the_figures_of_a_run(base: Base, split: Split) -> None:
    """Two records, one of them with three examples: one label each, and intervals resample records."""
    one, other = split.records[0], next(r for r in split.records if r.answer != split.records[0].answer)
    examples = split.examples[:4]
    labels = (str(one.answer), str(other.answer))
    test = EvalSet("test", CONFIG, (one, other, other, other), examples, labels)
    figures = measure_test_set(base, test, "base", 0.95, between_batches=lambda: None)
    assert figures.accuracy and figures.accuracy.base and figures.loss.base and figures.loss.base.interval
    assert figures.accuracy.adapter is figures.accuracy.mcnemar is figures.loss.difference is None
    right = round(2 * figures.accuracy.base.value)
    assert figures.accuracy.base.interval == wilson_interval(right, 2, 0.95)
    assert figures.best_constant == 0.5  # 0.75 were the copies counted
    loss = held_out_loss(base.model, examples, CONFIG.max_length)
    nll, weight = ([values[0], values[1:].sum()] for values in (loss.nll, loss.weight))
    # Of two records a resample is the one, the other or both: the interval ends at their own losses.
    assert figures.loss.base.interval == pytest.approx(sorted(n / w for n, w in zip(nll, weight, strict=True)))
    assert figures.loss.base.interval != pytest.approx(bootstrap_ratio_interval(loss.nll, loss.weight, 0.95))
