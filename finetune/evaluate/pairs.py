"""Held-out pair accuracy: how often a model gives the better of two answers the higher log-probability.

The log-probability is that of all the answer's weighted tokens after its own prompt, so it needs nothing but the losses
of the examples. Two controls belong to it: the rule that the shorter answer wins, and the accuracy after prompts were
exchanged among the records, which is above one half only if answers tell without their prompt which one is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finetune.data.harmony.render import Example
from finetune.evaluate.evalset import EvalSet
from finetune.evaluate.statistics import bootstrap_ratio_interval, mcnemar, wilson_interval
from finetune.figures import MODELS, Comparison, Figure, Model, PairFigures

_SHUFFLE_SEED = 0


def pair_figures(
    evalset: EvalSet,
    nll: Mapping[Model, NDArray[np.float64]],
    confidence: float,
    keep: NDArray[np.bool_] | None = None,
) -> PairFigures | None:
    """Figures of an evaluation set's pairs; None if it has none.

    Args:
        evalset: what was scored.
        nll: by model, float64 [examples], nats of each example's weighted tokens.
        confidence: level of the intervals.
        keep: bool [examples], which count. None: all.
    """
    pairs = [pair for pair in evalset.pairs if keep is None or keep[pair[0]]]
    if not pairs:
        return None
    better, worse = (np.array(side) for side in zip(*pairs, strict=True))
    records = evalset.record_numbers[better]
    margins = {model: each[worse] - each[better] for model, each in nll.items()}
    gained = margins["adapter"] - margins["base"] if len(margins) == 2 else None
    return PairFigures(
        pairs=len(pairs),
        accuracy=_compare({model: margin > 0 for model, margin in margins.items()}, records, confidence),
        margin=_compare(margins, records, confidence),
        reward_accuracy=None if gained is None else _figure(gained > 0, records, confidence),
        shorter_wins=_figure(_shorter_wins(evalset, pairs), records, confidence),
    )


def preferred_examples(evalset: EvalSet) -> NDArray[np.bool_]:
    """bool [examples]: those whose loss counts: not the answers that a preference record ranks below its best.

    Of labelled records, which have one answer each, the desirable ones; all, if none is.
    """
    scores = np.array([example.score for example in evalset.examples])
    first = np.zeros(len(scores), dtype=bool)
    first[list(evalset.first_examples)] = True
    alone = np.bincount(evalset.record_numbers)[evalset.record_numbers] == 1
    kept = np.isnan(scores) | (first & ~alone) | (alone & (scores > 0))
    return kept if kept.any() else np.ones_like(kept)


def shuffled_prompts(evalset: EvalSet) -> tuple[Example, ...]:
    """The set's examples, all answers of a record after the prompt of another one."""
    records = evalset.record_numbers
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(int(records.max()) + 1)
    next_record = np.empty_like(order)
    next_record[order] = np.roll(order, 1)  # one cycle through all records, so none keeps its own prompt
    first = evalset.first_examples
    return tuple(
        _after(evalset.examples[first[next_record[record]]], example)
        for record, example in zip(records.tolist(), evalset.examples, strict=True)
    )


def with_shuffled(
    figures: PairFigures, evalset: EvalSet, model: Model, nll: NDArray[np.float64], confidence: float
) -> PairFigures:
    """Add a model's accuracy after shuffled prompts. `nll` is of `shuffled_prompts`."""
    found = pair_figures(evalset, {model: nll}, confidence)
    return figures if found is None else replace(figures, shuffled=found.accuracy)


def _after(prompt: Example, answer: Example) -> Example:
    """An answer behind the prompt of another example."""
    shared = prompt.shared
    return replace(
        answer,
        ids=np.concatenate([prompt.ids[:shared], answer.ids[answer.shared :]]),
        weights=np.concatenate([np.zeros(shared, dtype=np.float32), answer.weights[answer.shared :]]),
        channels=np.concatenate([prompt.channels[:shared], answer.channels[answer.shared :]]),
        shared=shared,
    )


def _shorter_wins(evalset: EvalSet, pairs: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """float64 [pairs]: 1 where the better answer has fewer trained tokens, 1/2 where both have the same number."""
    tokens = np.array([[evalset.examples[number].num_trained_tokens for number in pair] for pair in pairs])
    return (1 + np.sign(tokens[:, 1] - tokens[:, 0])) / 2


def _figure(values: NDArray[np.generic], records: NDArray[np.int64], confidence: float) -> Figure:
    """A mean over pairs: Wilson's interval for a share of one pair per record, otherwise records are resampled."""
    numbers = np.unique(records, return_inverse=True)[1]
    sums, counts = np.bincount(numbers, values.astype(np.float64)), np.bincount(numbers).astype(np.float64)
    mean = float(sums.sum() / counts.sum())
    if values.dtype == np.bool_ and len(counts) == len(values):
        return Figure(mean, wilson_interval(int(values.sum()), len(values), confidence))
    return Figure(
        mean, bootstrap_ratio_interval(sums.astype(np.float64), counts, confidence) if len(counts) > 1 else None
    )


def _compare(values: Mapping[Model, NDArray[np.generic]], records: NDArray[np.int64], confidence: float) -> Comparison:
    figures = {model: _figure(each, records, confidence) for model, each in values.items()}
    if len(values) < 2:
        return Comparison(figures.get("base"), figures.get("adapter"))
    before, after = (values[model] for model in MODELS)
    difference = _figure(after.astype(np.float64) - before.astype(np.float64), records, confidence)
    is_share = before.dtype == np.bool_ and after.dtype == np.bool_
    one_each = len(np.unique(records)) == len(records)
    test = mcnemar(before.astype(np.bool_), after.astype(np.bool_)) if is_share and one_each else None
    return Comparison(figures["base"], figures["adapter"], difference, test)
