"""Figures of a whole evaluation from scores example by example: base, base + adapter, difference, and their intervals.

Shape legend: n records, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finetune import log
from finetune.data.sources import Record
from finetune.evaluate.evalset import EvalSet
from finetune.evaluate.labels import own_tokens
from finetune.evaluate.likelihood import BetweenBatches, held_out_loss
from finetune.evaluate.measure import ExampleScore, GeneratedAnswer, MeasurementLog, score_set
from finetune.evaluate.pairs import pair_figures, preferred_examples, shuffled_prompts, with_shuffled
from finetune.evaluate.prose import is_refusal, prose_figures
from finetune.evaluate.statistics import (
    Classification,
    bootstrap_intervals,
    bootstrap_ratio_interval,
    mcnemar,
    wilson_interval,
)
from finetune.figures import MODELS, Comparison, Figure, Model
from finetune.model.build import Base
from finetune.results import (
    AnswerFigures,
    FormFigures,
    LabelFigures,
    OneLabel,
    ReliabilityBin,
    SuiteFigures,
    perplexity,
)

_MOST_CONFUSED = 8


def measure_test_set(
    base: Base, test: EvalSet, model: Model, confidence: float, *, between_batches: BetweenBatches
) -> SuiteFigures:
    """Score the test set of a training run with the model as it is.

    Args:
        base: with the adapter off (`base`) or on (`adapter`).
        test: what to score.
        model: which model it is.
        confidence: level of the intervals.
        between_batches: see `BetweenBatches`.

    Raises:
        CheckError: a loss or a label's score is not finite.
    """
    base.model.eval()
    scores = score_set(base.model, test, model, between_batches=between_batches)
    figures = summarise_set(test, {model: scores}, confidence)
    if figures.pairs is not None and len(test.first_examples) > 1:
        shuffled = shuffled_prompts(test)
        longest = max([test.data.max_length, *(len(example.ids) for example in shuffled)])
        loss = held_out_loss(base.model, shuffled, longest, task="shuffled prompts", between_batches=between_batches)
        figures = replace(figures, pairs=with_shuffled(figures.pairs, test, model, loss.nll, confidence))
    log.info(f"{'before' if model == 'base' else 'after'}: {_describe(figures, model)}")
    return figures


def _describe(figures: SuiteFigures, model: Model) -> str:
    """One model's loss and accuracy as one line."""
    loss = figures.loss.of(model)
    assert loss is not None
    text = f"test loss {loss.text()}"
    if figures.accuracy and (accuracy := figures.accuracy.of(model)):
        text += f", accuracy {accuracy.text()} over {figures.num_labels} labels"
    if figures.pairs and (accuracy := figures.pairs.accuracy.of(model)):
        text += f", pair accuracy {accuracy.text()} of {figures.pairs.pairs} pairs"
        if figures.pairs.shuffled and (control := figures.pairs.shuffled.of(model)):
            text += f" (prompts shuffled: {control.text()})"
    return f"{text} on {figures.rows} examples" + ("" if loss.interval else ": one record, which gives no interval")


def summarise_set(
    evalset: EvalSet,
    scores: Mapping[Model, Sequence[ExampleScore]],
    confidence: float,
    keep: NDArray[np.bool_] | None = None,
) -> SuiteFigures:
    """Figures of one evaluation set, of one model or of both with their difference.

    Args:
        evalset: what was scored.
        scores: by model, one for each example of the set.
        confidence: level of the intervals.
        keep: bool [examples], which examples count, with all examples of a record or none. None: all.

    Returns:
        Losses, and for a label set accuracy by the likelihood of the whole answer. With both models also paired
        differences, McNemar's test, accuracy per token, macro-F1, calibration and each label's figures. Intervals
        resample records; with one record there is none, except for shares.
    """
    preferred = preferred_examples(evalset)
    chosen = [n for n in range(len(evalset.examples)) if preferred[n] and (keep is None or keep[n])]
    used = {model: [each[n] for n in chosen] for model, each in scores.items()}
    weights = evalset.by_record(np.array([score.weight for score in next(iter(used.values()))]), chosen)
    nll = {model: evalset.by_record(np.array([score.nll for score in each]), chosen) for model, each in used.items()}
    loss = _losses(nll, weights, confidence)
    of_pairs = {model: np.array([score.nll for score in each]) for model, each in scores.items()}
    pairs = pair_figures(evalset, of_pairs, confidence, keep)
    figures = SuiteFigures(evalset.name, len(chosen), len(weights), loss, perplexity(loss), pairs=pairs)
    if evalset.labels is None:
        return figures
    labelled = [n for n in chosen if n in evalset.labelled_examples]
    right = np.array([evalset.labels.index(evalset.records[n].answer or "") for n in labelled])
    return _with_labels(
        figures,
        evalset.labels,
        right,
        {model: [each[n] for n in labelled] for model, each in scores.items()},
        confidence,
    )


def summarise_log(
    evalset: EvalSet, measured: MeasurementLog, confidence: float, keep: NDArray[np.bool_] | None = None
) -> SuiteFigures:
    """`summarise_set` of both models' scores in a complete log."""
    numbers = range(len(evalset.examples))
    scores = {model: measured.scores(model, evalset.name, numbers) for model in MODELS}
    return summarise_set(evalset, scores, confidence, keep)


def _losses(nll: Mapping[Model, NDArray[np.float64]], weight: NDArray[np.float64], confidence: float) -> Comparison:
    def figure(values: NDArray[np.float64]) -> Figure:
        interval = bootstrap_ratio_interval(values, weight, confidence) if len(weight) > 1 else None
        return Figure(float(values.sum() / weight.sum()), interval)

    figures = {model: figure(values) for model, values in nll.items()}
    difference = figure(nll["adapter"] - nll["base"]) if len(nll) == 2 else None
    return Comparison(figures.get("base"), figures.get("adapter"), difference)


def _with_labels(
    figures: SuiteFigures,
    labels: tuple[str, ...],
    right: NDArray[np.int64],
    scores: Mapping[Model, Sequence[ExampleScore]],
    confidence: float,
) -> SuiteFigures:
    """Add the figures of labels.

    Args:
        figures: of the losses.
        labels: the candidates.
        right: int64 [n], index of each record's own label.
        scores: by model, of the n records.
        confidence: level of the intervals.
    """
    nats = {model: np.array([score.labels for score in each]) for model, each in scores.items()}
    found = {model: Classification.of(labels, values, right) for model, values in nats.items()}
    figures = replace(
        figures,
        num_labels=len(labels),
        best_constant=float(np.bincount(right).max() / len(right)),
        accuracy=compare_shares({model: each.is_right for model, each in found.items()}, confidence),
    )
    if len(found) < 2:
        return figures
    tokens = own_tokens(labels)
    per_token = {
        model: Classification.of(labels, nats[model], right, (np.array([s.shared_nats for s in each]), tokens))
        for model, each in scores.items()
    }
    return replace(
        with_label_figures(figures, found, confidence),
        most_confused=found["adapter"].most_confused(_MOST_CONFUSED),
        accuracy_per_token=compare_shares({model: each.is_right for model, each in per_token.items()}, confidence),
    )


def compare_shares(right: Mapping[Model, NDArray[np.bool_]], confidence: float) -> Comparison:
    """The share of records that each model has right, with Wilson's interval; with both, whether they differ.

    Args:
        right: by model, bool [n] on the same records.
        confidence: level of the intervals.
    """
    shares = {model: _share(int(hits.sum()), len(hits), confidence) for model, hits in right.items()}
    if len(right) < 2:
        return Comparison(shares.get("base"), shares.get("adapter"))
    before, after = (right[model].astype(np.float64) for model in MODELS)
    several = len(before) > 1
    interval = bootstrap_ratio_interval(after - before, np.ones(len(before)), confidence) if several else None
    difference = Figure(float(after.mean() - before.mean()), interval)
    return Comparison(shares["base"], shares["adapter"], difference, mcnemar(right["base"], right["adapter"]))


def with_label_figures(figures: SuiteFigures, found: Mapping[Model, Classification], confidence: float) -> SuiteFigures:
    """Add macro-F1 and calibration error with their paired differences, and each label's own figures.

    Args:
        figures: of the same evaluation set.
        found: what both models chose for the same records.
        confidence: level of the intervals.
    """
    labels, total = found["base"].labels, len(found["base"].right)

    def macro_and_each_f1(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        each = [found[model].f1(rows) for model in MODELS]
        before, after = (np.nanmean(of_labels) for of_labels in each)
        return np.concatenate([[before, after, after - before], *each])

    def calibration_errors(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        before, after = (found[model].calibration_error(rows) for model in MODELS)
        return np.array([before, after, after - before])

    everything = np.arange(total)
    f1 = bootstrap_intervals(macro_and_each_f1, total, confidence)
    calibration = bootstrap_intervals(calibration_errors, total, confidence, kind="reflected")
    calibration[:2] = calibration[:2].clip(0, 1)
    of_labels = {
        "base": _each_label(found["base"], f1[3 : 3 + len(labels)], confidence),
        "adapter": _each_label(found["adapter"], f1[3 + len(labels) :], confidence),
    }
    rows = np.bincount(found["base"].right, minlength=len(labels)).tolist()
    return replace(
        figures,
        macro_f1=_compared(macro_and_each_f1(everything), f1, total),
        calibration_error=_compared(calibration_errors(everything), calibration, total),
        reliability={model: _reliability(found[model], confidence) for model in MODELS},
        labels=list(labels),
        confusion={model: found[model].confusion.tolist() for model in MODELS},
        per_label=[
            LabelFigures(label, count, base, adapter)
            for label, count, base, adapter in zip(labels, rows, of_labels["base"], of_labels["adapter"], strict=True)
        ],
    )


def _reliability(found: Classification, confidence: float) -> list[ReliabilityBin]:
    return [
        ReliabilityBin(rows, right, sure, *wilson_interval(round(rows * right), rows, confidence))
        for rows, right, sure in found.reliability()
    ]


def _each_label(found: Classification, f1_ends: NDArray[np.float64], confidence: float) -> list[OneLabel]:
    """Count the choices of each label, with its precision, recall and F1.

    Args:
        found: what one model chose.
        f1_ends: float64 [C, 2], F1's intervals.
        confidence: level of the others.
    """
    table = found.confusion
    f1 = found.f1(np.arange(len(found.right)))
    figures = []
    for number, ends in enumerate(f1_ends):
        hits, own, chosen = int(table[number, number]), int(table[number].sum()), int(table[:, number].sum())
        interval = tuple(ends.tolist()) if len(found.right) > 1 and not np.isnan(ends).any() else None
        figures.append(
            OneLabel(
                chosen,
                _share(hits, chosen, confidence) if chosen else None,
                _share(hits, own, confidence) if own else None,
                Figure(float(f1[number]), interval) if own + chosen else None,
            )
        )
    return figures


def _share(hits: int, total: int, confidence: float) -> Figure:
    return Figure(hits / total, wilson_interval(hits, total, confidence))


def _compared(values: NDArray[np.float64], ends: NDArray[np.float64], num_rows: int) -> Comparison:
    """The first three of some figures as base, adapter and difference."""
    base, adapter, difference = (
        Figure(float(value), (float(low), float(high)) if num_rows > 1 else None)
        for value, (low, high) in zip(values[:3], ends[:3], strict=True)
    )
    return Comparison(base, adapter, difference)


def summarise_answers(
    evalset: EvalSet, log: MeasurementLog, count: int, train: Sequence[Record] | None, confidence: float
) -> AnswerFigures:
    """Figures of generated answers.

    Args:
        evalset: whose examples were answered.
        log: with the answers.
        count: how many were asked for.
        train: training records, for copies and voice; None: not known, and these figures are left out.
        confidence: level of the intervals.
    """
    numbers = evalset.answered_examples(count)
    records = [evalset.records[n] for n in numbers]
    answers = {model: log.answers(model, evalset.name, numbers) for model in MODELS}
    exact = [n for n, record in enumerate(records) if record.answer is not None]
    prose = [n for n, record in enumerate(records) if record.answer is None]
    same = {model: np.array([_is_exact(answers[model][n], records[n]) for n in exact]) for model in MODELS}
    texts: dict[str, list[str]] = {model: [answers[model][n].final for n in prose] for model in MODELS}
    texts["reference"] = [records[n].messages[-1].content for n in prose]
    return AnswerFigures(
        evalset.name,
        len(numbers),
        _form(answers["base"], confidence),
        _form(answers["adapter"], confidence),
        len(exact),
        len(prose),
        compare_shares(same, confidence) if exact else None,
        prose_figures(texts, [records[n] for n in prose], train) if prose else None,
    )


def _form(answers: Sequence[GeneratedAnswer], confidence: float) -> FormFigures:
    found = {
        "stopped": sum(answer.stopped for answer in answers),
        "cut": sum(not answer.stopped for answer in answers),
        "format_errors": sum(answer.error is not None for answer in answers),
        "refusals": sum(is_refusal(answer.final) for answer in answers),
    }
    intervals = {name: wilson_interval(count, len(answers), confidence) for name, count in found.items()}
    lengths = np.array([answer.tokens for answer in answers], dtype=np.float64)
    if len(answers) > 1:
        intervals["mean_tokens"] = bootstrap_ratio_interval(lengths, np.ones(len(answers)), confidence)
    return FormFigures(**found, mean_tokens=float(lengths.mean()), intervals=intervals)


def _is_exact(answer: GeneratedAnswer, record: Record) -> bool:
    """Whether a generated answer equals the record's; one with a format error does not."""
    return answer.error is None and _normalised(answer.final) == _normalised(record.answer or "")


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
