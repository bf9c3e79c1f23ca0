"""report.md: what a run did and what came of it, read from its directory alone.

Works on a run that is still going or was stopped: what is not there yet is left out and said.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from finetune.report.survival import survival_section

NUM_CURVE_POINTS = 12


def write_report(run: Path) -> Path:
    """Write report.md from config.yaml, manifest.json, metrics.jsonl and evaluation.json.

    Args:
        run: a run directory; files that are missing or half-written are left out.

    Returns:
        The report's path.
    """
    manifest, evaluation = _read_json(run / "manifest.json"), _read_json(run / "evaluation.json")
    lines = _read_lines(run / "metrics.jsonl")
    sections = [
        f"# Run {run.name}\n\n{_summary(manifest, evaluation)}",
        _evaluation(evaluation),
        survival_section(run),
        _training(lines),
        _checks(manifest),
        _facts(manifest),
        "## Configuration\n\nThe whole of it is in `config.yaml`; overrides on the command line: "
        + (", ".join(_code(text) for text in manifest.get("overrides", [])) or "none")
        + ".",
    ]
    path = run / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path


def outcome(run: Path) -> str:
    """What a finished run gained and where its files are, as a few lines for the terminal."""
    manifest, evaluation = _read_json(run / "manifest.json"), _read_json(run / "evaluation.json")
    lines = [f"finished in {manifest.get('minutes')} minutes, at most {manifest.get('peak_memory_gib')} GiB"]
    if "after" in evaluation:
        before, after = evaluation["before"], evaluation["after"]
        for title, key in (("test loss", "loss"), ("accuracy", "accuracy")):
            if key in after:
                lines.append(f"  {title:<10} {_with_interval(before, key)} -> {_with_interval(after, key)}")
    lines += [f"  report     {run / 'report.md'}", f"  adapter    {run / 'adapter'}"]
    return "\n".join(lines)


def _summary(manifest: dict[str, Any], evaluation: dict[str, Any]) -> str:
    status = manifest.get("status", "unknown")
    parts = [f"Recipe {_code(manifest.get('recipe', '?'))}, status: **{status}**."]
    if stopped := manifest.get("stopped_by"):
        parts.append(f"It was stopped by {_code(stopped)}.")
    if "minutes" in manifest:
        parts.append(f"Took {manifest['minutes']} minutes and at most {manifest['peak_memory_gib']} GiB.")
    if "after" in evaluation:
        before, after = evaluation["before"], evaluation["after"]
        parts.append(f"Test loss went from {before['loss']:.3f} to {after['loss']:.3f} nats per trained token.")
        if "accuracy" in after:
            parts.append(f"Accuracy went from {before['accuracy']:.3f} to {after['accuracy']:.3f}.")
    return " ".join(part for part in parts if part)


def _evaluation(evaluation: dict[str, Any]) -> str:
    if not evaluation:
        return ""
    shown = [when for when in ("before", "after") if when in evaluation]
    first = evaluation[shown[0]]
    rows = [("test loss (nats per trained token)", "loss"), ("label accuracy", "accuracy")]
    titles = {"before": "before (base alone)", "after": "after"}
    table = ["| | " + " | ".join(titles[when] for when in shown) + " |", "|---|" + "---|" * len(shown)]
    for title, key in rows:
        if key in first:
            cells = [_with_interval(evaluation[when], key) for when in shown]
            table.append(f"| {title} | " + " | ".join(cells) + " |")
    note = f"{first['rows']} test rows, {first['confidence']:.0%} intervals"
    if "num_labels" in first:
        note += (
            f"; labels scored by likelihood among {first['num_labels']}, "
            f"always giving the most frequent one scores {first['best_constant_accuracy']:.3f}"
        )
    return "## Before and after\n\n" + "\n".join(table) + f"\n\n{note}."


def _with_interval(figures: dict[str, Any], key: str) -> str:
    low, high = figures[f"{key}_interval"]
    return f"{figures[key]:.3f} [{low:.3f}, {high:.3f}]"


def _training(lines: list[dict[str, Any]]) -> str:
    steps = [line for line in lines if line.get("kind") == "step"]
    if not steps:
        return "## Training\n\nNo step was made yet."
    every = max(1, len(steps) // NUM_CURVE_POINTS)
    shown = [*steps[::every], *([steps[-1]] if (len(steps) - 1) % every else [])]
    validations = {line["step"]: line["validation_loss"] for line in lines if line.get("kind") == "evaluation"}
    table = [
        "| step | loss | balance | gradient norm | learning rate | tokens/s | memory GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    table += [
        f"| {s['step']} | {s['loss']:.4f} | {s['balance_loss']:.3f} | {s['gradient_norm']:.3f} "
        f"| {s['learning_rate']:.2e} | {s['tokens_per_second']:,.0f} | {s['memory_gib']:.2f} |"
        for s in shown
    ]
    text = "## Training\n\n" + "\n".join(table)
    if validations:
        best = min(validations, key=lambda step: validations[step])
        text += "\n\nValidation loss: " + ", ".join(f"{loss:.4f} (step {step})" for step, loss in validations.items())
        text += f"; best at step {best}."
    return text


def _checks(manifest: dict[str, Any]) -> str:
    lines = [f"- {line}" for line in manifest.get("audit") or []]
    match manifest.get("read_back"):
        case {"skipped": reason}:
            lines.append(f"- **not read back** with stock PEFT: {reason}")
        case {"conclusive": False, "effect_kl": effect, "mean_kl": found}:
            lines.append(
                f"- read back by stock PEFT, **inconclusive**: the adapter changes so little (KL {effect:.1e}) that "
                f"ignoring it would hardly show (KL {found:.1e} found)"
            )
        case {"max_difference": difference, "effect": effect, "samples": samples}:
            lines.append(
                f"- read back by stock PEFT in a fresh process: logits differ by {difference:.1e} at most on {samples} "
                f"samples (the adapter itself moves them by {effect:.1f})"
            )
    if "adapter_of_step" in manifest:
        lines.append(f"- the adapter is the one of step {manifest['adapter_of_step']} (best validation loss)")
    return "## Checks\n\n" + "\n".join(lines) if lines else ""


def _facts(manifest: dict[str, Any]) -> str:
    if "base" not in manifest:
        return ""
    base, environment = manifest["base"], manifest["environment"]
    lines = [
        f"- base: {_code(base['name'])}, revision {base['revision'] or 'none'}, identity `{base['identity'][:16]}`"
    ]
    lines += [
        f"- data, {name}: {facts['rows']:,} rows, {facts['tokens']:,} tokens, {facts['trained_tokens']:,} trained, "
        f"{facts['skipped_rows']:,} skipped, fingerprint `{facts['fingerprint'][:16]}`"
        for name, facts in manifest["data"].items()
    ]
    counts = ", ".join(f"{kind} {count:,}" for kind, count in manifest["adapter_parameters"].items())
    lines.append(f"- trained parameters: {counts}")
    lines.append("- environment: " + ", ".join(f"{key} {value}" for key, value in environment.items()))
    return "## Facts\n\n" + "\n".join(lines)


def _code(text: str) -> str:
    """Text of a person's own as code, whatever stands in it."""
    line = " ".join(text.split())
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (max(map(len, re.findall("`+", line))) + 1)
    return f"{fence} {line} {fence}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole JSON lines of a file; a half-written last one is left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
