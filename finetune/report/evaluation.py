"""The summary of `finetune evaluate` in words and tables; also a part of the run report."""

from __future__ import annotations

from typing import Any

from finetune.report.words import code

_WHO = ("base", "adapter")


def describe_evaluation(summary: dict[str, Any]) -> str:
    """Markdown of a `summary.json`."""
    parts = [
        f"# {code(summary['adapter'])} against its base",
        f"Base {code(summary['base']['name'])}, identity `{summary['base']['identity'][:16]}`. Both saw the same "
        f"rows; intervals are {summary['confidence']:.0%}, differences are paired row by row.",
        _notes(summary),
        _losses(summary["suites"]),
        *(_labels(suite) for suite in summary["suites"] if "accuracy" in suite),
        _contamination(summary.get("contamination")),
        _answers(summary.get("answers")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(summary: dict[str, Any]) -> str:
    notes = summary.get("notes")
    return "\n".join(["## To know before reading", "", *(f"* {note}" for note in notes)]) if notes else ""


def _losses(suites: list[dict[str, Any]]) -> str:
    lines = [
        "## Loss, nats per trained token",
        "",
        "| rows | base | base + adapter | difference | perplexity |",
        "|---|---|---|---|---|",
    ]
    for suite in suites:
        loss, perplexity = suite["loss"], suite["perplexity"]
        name = "test" if suite["suite"] == "test" else f"retention: {suite['suite']}"
        lines.append(
            f"| {name} ({suite['rows']}) | {_interval(loss['base'])} | {_interval(loss['adapter'])} "
            f"| {_interval(loss['difference'], sign=True)} | {perplexity['base']:.4g} -> {perplexity['adapter']:.4g} |"
        )
    if len(suites) > 1:
        lines += ["", "Retention rows are of domains that were not trained on: a rise there is what was forgotten."]
    return "\n".join(lines)


def _labels(suite: dict[str, Any]) -> str:
    lines = [
        f"## Labels: {suite['suite']}",
        "",
        f"{suite['num_labels']} labels scored by likelihood; always giving the most frequent one is right for "
        f"{suite['best_constant']:.3f} of the rows.",
        "",
        "| | base | base + adapter | difference |",
        "|---|---|---|---|",
    ]
    for title, key in (("accuracy", "accuracy"), ("accuracy, likelihood per token", "accuracy_per_token")):
        found = suite[key]
        lines.append(
            f"| {title} | {_interval(found['base'])} | {_interval(found['adapter'])} "
            f"| {_interval(found['difference'], sign=True)} |"
        )
    for title, key in (("macro-F1", "macro_f1"), ("expected calibration error", "calibration_error")):
        before, after = (suite[key][who] for who in _WHO)
        lines.append(f"| {title} | {before:.3f} | {after:.3f} | {after - before:+.3f} |")
    test = suite["accuracy"]["mcnemar"]
    lines += [
        "",
        f"{test['gained']} rows became right and {test['lost']} wrong (exact McNemar test: p = {test['p_value']:.2g}).",
    ]
    if suite["most_confused"]:
        pairs = "; ".join(
            f"{code(own)} taken for {code(got)} {count} times" for own, got, count in suite["most_confused"]
        )
        lines.append(f"Most often mixed up: {pairs}.")
    return "\n".join(lines)


def _contamination(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    text = (
        f"## Seen in training\n\n{found['seen']} of {found['rows']} test rows have half or more of their 13-word runs "
        f"in the training rows; {found['touched']} have any; {found['too_short']} are too short to tell."
    )
    if (without := found.get("without_seen")) is not None:
        text += f" Without the seen ones the loss is {_interval(without['loss']['adapter'])}"
        if "accuracy" in without:
            text += f" and the accuracy {_interval(without['accuracy']['adapter'])}"
        text += f" after, on {without['rows']} rows."
    return text


def _answers(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    rows = [("stopped by themselves", "stopped"), ("cut at the longest length", "cut")]
    rows += [("broke harmony's form", "format_errors"), ("refused", "refusals")]
    lines = [f"## Generated answers ({found['rows']} rows)", "", "| | base | base + adapter |", "|---|---|---|"]
    lines += [f"| {title} | {found['base'][key]} | {found['adapter'][key]} |" for title, key in rows]
    lines.append(f"| mean tokens | {found['base']['mean_tokens']:.0f} | {found['adapter']['mean_tokens']:.0f} |")
    if "exact" in found["base"]:
        lines.append(f"| equal to the answer | {found['base']['exact']:.3f} | {found['adapter']['exact']:.3f} |")
    if (prose := found.get("prose")) is not None:
        lines += ["", "| prose | base | base + adapter | the real continuation |", "|---|---|---|---|"]
        titles = {
            "distinct_1": "distinct words / words",
            "distinct_2": "distinct pairs / pairs",
            "longest_copy_words": "longest run of words copied from training",
            "median_copy_words": "median of that",
            "own_author": "taken for its own author",
        }
        for key, title in titles.items():
            if key in prose["base"]:
                lines.append(f"| {title} | " + " | ".join(f"{prose[w][key]:.4g}" for w in (*_WHO, "reference")) + " |")
    return "\n".join(lines)


def _interval(figure: dict[str, Any], *, sign: bool = False) -> str:
    low, high = figure["interval"]
    form = "+.3f" if sign else ".3f"
    return f"{figure['value']:{form}} [{low:{form}}, {high:{form}}]"
