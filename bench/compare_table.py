"""The tables of `bench/compare.py`: validation losses of the learning rates, and figures on test examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from compare_plan import Line, Run

from finetune.evaluate.statistics import wilson_interval

RATES_NOTE = (
    "Nats per trained token of the validation rows, with the first seed; the end decides. No test row was looked at. "
    "The last look but one tells whether longer training would still gain."
)
TEST_NOTE = (
    "Loss: nats of a row's answer (label tasks) or of a token (creative), mean over test rows. `difference` is to the "
    "first kind of the task in the loss, paired by seed: mean, least and most. `centred`: accuracy after taking each "
    "label's mean log-likelihood off, which shows what a model associates whatever it prefers to say. Learning rates "
    "are those that the other table chose on validation rows; alpha is the same for every rank. A control must not "
    "beat the most frequent answer by more than chance (99 %): neither its training rows nor its base say what is "
    "right. Labels shuffled on the given base are no such control: pretraining associated clauses with words of the "
    "labels' names. `beats constant`: the 95 % interval of the accuracy (Wilson) lies above the most frequent answer's "
    "with every seed. `balance`: load-balancing loss of the last steps, before its coefficient; 1: experts are used "
    "alike."
)
Scores = dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """A run, the results of its training, and its test scores."""

    run: Run
    result: dict[str, Any]
    scores: Scores


Trials = dict[float, dict[str, Any]]
"""Learning rate: what training at it gave."""


def best_rate(tried: Trials) -> float:
    """The learning rate with the least final validation loss."""
    return min(tried, key=lambda rate: float(tried[rate]["validation"][-1][1]))


def rates_table(trials: dict[Line, Trials], num_rates: int) -> list[dict[str, Any]]:
    """One line per kind and rate; none is chosen before all `num_rates` were tried."""
    rows = []
    for line, tried in trials.items():
        best = best_rate(tried) if len(tried) == num_rates else None
        for rate, result in sorted(tried.items()):
            looks = result["validation"]
            rows.append(
                {
                    "task": line.task,
                    "variant": line.name,
                    "learning rate": rate,
                    "steps": result["steps"],
                    "before the end": f"{looks[-2][1]:.4f} (step {looks[-2][0]})" if len(looks) > 1 else "",
                    "at the end": f"{looks[-1][1]:.4f}",
                    "taken": "yes" if rate == best else "",
                }
            )
    return rows


def test_table(
    finished: list[Finished], base_scores: dict[tuple[str, str, str], Scores], large: bool
) -> list[dict[str, Any]]:
    """Task by task: the base, the most frequent answer, then every line that has runs."""
    tasks = dict.fromkeys(each.run.line.task for each in finished)
    return [row for task in tasks for row in _of_task(task, finished, base_scores, large)]


def _of_task(
    task: str, finished: list[Finished], base_scores: dict[tuple[str, str, str], Scores], large: bool
) -> Iterator[dict[str, Any]]:
    for (its_task, base, renamed), scores in base_scores.items():
        if its_task == task:
            name = ", ".join(
                ["base", *([base] if base != "given" else []), *([f"labels {renamed}"] if renamed else [])]
            )
            yield {"task": task, "variant": name} | figures([scores])
    own = base_scores.get((task, "given", ""))
    if own and "right" in own:
        yield {"task": task, "variant": "most frequent answer", "accuracy": round(constant(own), 3)}
    by_line: dict[Line, list[Finished]] = {}
    for each in finished:
        if each.run.line.task == task:
            by_line.setdefault(each.run.line, []).append(each)
    reference = {each.run.seed: each.scores for each in next(iter(by_line.values()))}
    for number, (line, runs) in enumerate(by_line.items()):
        shown = _line(line, runs, large)
        comparable = number > 0 and line.labels == "as they are" and line.base == "given"
        yield shown | (differences({run.run.seed: run.scores for run in runs}, reference) if comparable else {})


def _line(line: Line, runs: list[Finished], large: bool) -> dict[str, Any]:
    first = runs[0].result
    seconds = [run.result["clock"] / run.result["steps"] if large else run.result["processor_seconds_per_step"]
               for run in runs]  # fmt: skip
    row: dict[str, Any] = {
        "task": line.task,
        "variant": line.name,
        "seeds": len(runs),
        "learning rate": runs[0].run.learning_rate,
        "parameters": first["parameters"],
        "steps": first["steps"],
        "ms a step": round(1e3 * mean(seconds)),
    }
    if all("balance" in run.result for run in runs):
        row["balance"] = round(mean(run.result["balance"] for run in runs), 3)
    row |= figures([run.scores for run in runs])
    if line.must_learn_nothing:
        row["control"] = "FAILED" if any(beats_constant(run.scores, 0.99) for run in runs) else "passed"
    elif "right" in runs[0].scores:
        row["beats constant"] = "yes" if all(beats_constant(run.scores, 0.95) for run in runs) else "no"
    return row


def figures(scores: list[Scores]) -> dict[str, Any]:
    """Loss and accuracy: mean, and each seed's; of an accuracy also the Wilson interval of the mean's examples."""
    losses = [loss_of(each) for each in scores]
    line: dict[str, Any] = {"loss": round(mean(losses), 3), "loss by seed": by_seed(losses)}
    if "right" not in scores[0]:
        return line | {"perplexity": round(math.exp(mean(losses)), 1)}
    accuracies = [accuracy_of(each) for each in scores]
    rows = len(scores[0]["right"])
    low, high = wilson_interval(round(mean(accuracies) * rows), rows, 0.95)
    return line | {
        "accuracy": round(mean(accuracies), 3),
        "95 % (rows)": f"{low:.3f} to {high:.3f}",
        "accuracy by seed": by_seed(accuracies),
        "centred": by_seed([accuracy_of(each, "centred") for each in scores]),
    }


def loss_of(scores: Scores) -> float:
    """Nats per token, or per answer."""
    return float(sum(scores["nll"]) / sum(scores["tokens"]))


def accuracy_of(scores: Scores, how: str = "chosen") -> float:
    """Share of examples whose right label was chosen."""
    return float(np.mean(np.array(scores["right"]) == np.array(scores[how])))


def constant(scores: Scores) -> float:
    """Accuracy of always giving the test examples' most frequent answer."""
    return float(np.bincount(scores["right"]).max() / len(scores["right"]))


def beats_constant(scores: Scores, confidence: float) -> bool:
    """Whether accuracy lies above the most frequent answer's by more than chance (two-sided interval)."""
    right = np.array(scores["right"])
    num_right = int((right == np.array(scores["chosen"])).sum())
    return wilson_interval(num_right, len(right), confidence)[0] > constant(scores)


def differences(runs: dict[int, Scores], reference: dict[int, Scores]) -> dict[str, Any]:
    """Loss less the reference's with the same seed: mean [least, most]."""
    found = [loss_of(scores) - loss_of(reference[seed]) for seed, scores in runs.items() if seed in reference]
    return {"difference": f"{mean(found):+.3f} [{min(found):+.3f}, {max(found):+.3f}]"} if found else {}


def by_seed(values: list[float]) -> str:
    """One figure per seed."""
    return " ".join(f"{value:.3f}" for value in values)
