"""The summary of `finetune evaluate` in words and tables, as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.report.content import (
    TITLES,
    Confusion,
    Piece,
    Reliability,
    Table,
    check_lines,
    code,
    evaluation_parts,
    introduction,
    summary,
    with_interval,
)
from finetune.report.experts import experts_section
from finetune.report.read import read_json, read_lines
from finetune.report.reliability import reliability_rows
from finetune.report.survival import survival_section


def describe_evaluation(summary: dict[str, Any], *, details: bool = True) -> str:
    """Markdown of a `summary.json`.

    Args:
        summary: its content, also of an older version.
        details: with the long tables: calibration, confusion, each label's own figures.
    """
    blocks = [f"# {code(summary['adapter'])} against its base", introduction(summary)]
    for part in evaluation_parts(summary):
        blocks += [f"## {part.title}", *map(_markdown, [*part.content, *(part.details if details else ())])]
    return "\n\n".join(blocks) + "\n"


def _markdown(piece: Piece) -> str:
    match piece:
        case str():
            return piece
        case Table():
            return _table(piece)
        case Confusion():
            return f"### {piece.title}\n\nA row for each own label, a column for each chosen one.\n\n" + _confusion(
                piece
            )
        case Reliability():
            head = ("confidence", "rows", "mean confidence", "accuracy")
            tables = (
                f"### Calibration ({TITLES[who]})\n\n{_table(Table(head, reliability_rows(bins)))}"
                for who, bins in piece.bins.items()
            )
            return "\n\n".join(tables)


def _table(table: Table) -> str:
    rows = [[code(row[0]), *row[1:]] for row in table.rows] if table.names else table.rows
    lines = [table.head, ["---"] * len(table.head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _confusion(found: Confusion) -> str:
    """Columns bear the numbers of their labels: names would make them far too wide."""
    numbers = [str(number) for number in range(1, len(found.labels) + 1)]
    rows = [
        (f"{number}. {code(label)}", *map(str, counts))
        for number, label, counts in zip(numbers, found.labels, found.counts, strict=True)
    ]
    return _table(Table(("", *numbers), rows))


# report.md: what a run did and what came of it, read from its directory alone.
#
# Works on a run that is still going or was stopped: what is not there yet is left out and said.

NUM_CURVE_POINTS = 12


def write_report(run: Path) -> Path:
    """Write report.md from config.yaml, manifest.json, metrics.jsonl and evaluation.json.

    Args:
        run: a run directory; files that are missing or half-written are left out.

    Returns:
        The report's path.
    """
    manifest, evaluation = read_json(run / "manifest.json"), read_json(run / "evaluation.json")
    lines = read_lines(run / "metrics.jsonl")
    sections = [
        f"# Run {run.name}\n\n{summary(manifest, evaluation)}",
        _evaluation(evaluation),
        survival_section(run),
        _training(lines),
        experts_section(run, manifest),
        "## Checks\n\n" + "\n".join(check_lines(manifest)) if check_lines(manifest) else "",
        _facts(manifest),
        "## Configuration\n\nThe whole of it is in `config.yaml`; overrides on the command line: "
        + (", ".join(code(text) for text in manifest.get("overrides", [])) or "none")
        + ".",
    ]
    path = run / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path


def outcome(run: Path) -> str:
    """What a finished run gained and where its files are, as a few lines for the terminal."""
    manifest, evaluation = read_json(run / "manifest.json"), read_json(run / "evaluation.json")
    lines = [f"finished in {manifest.get('minutes')} minutes, at most {manifest.get('peak_memory_gib')} GiB"]
    if "after" in evaluation:
        before, after = evaluation["before"], evaluation["after"]
        for title, key in (("test loss", "loss"), ("accuracy", "accuracy")):
            if key in after:
                lines.append(f"  {title:<10} {with_interval(before, key)} -> {with_interval(after, key)}")
    lines += [f"  report     {run / 'report.html'}", f"  adapter    {run / 'adapter'}"]
    lines.append(f'  next       finetune generate {run} "..."; finetune export {run} --to peft')
    return "\n".join(lines)


def outcome_record(run: Path) -> dict[str, Any]:
    """What `outcome` says, and both evaluations whole, as plain data."""
    manifest, evaluation = read_json(run / "manifest.json"), read_json(run / "evaluation.json")
    figures = {key: manifest.get(key) for key in ("status", "minutes", "peak_memory_gib", "total_steps")}
    places = {"run": str(run), "report": str(run / "report.html"), "adapter": str(run / "adapter")}
    return {**places, **figures, "evaluation": evaluation}


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
            cells = [with_interval(evaluation[when], key) for when in shown]
            table.append(f"| {title} | " + " | ".join(cells) + " |")
    note = f"{first['rows']} test rows, {first['confidence']:.0%} intervals"
    if "num_labels" in first:
        note += (
            f"; labels scored by likelihood among {first['num_labels']}, "
            f"always giving the most frequent one scores {first['best_constant_accuracy']:.3f}"
        )
    return "## Before and after\n\n" + "\n".join(table) + f"\n\n{note}."


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


def _facts(manifest: dict[str, Any]) -> str:
    if "base" not in manifest:
        return ""
    base, environment = manifest["base"], manifest["environment"]
    lines = [f"- base: {code(base['name'])}, revision {base['revision'] or 'none'}, identity `{base['identity'][:16]}`"]
    lines += [
        f"- data, {name}: {facts['rows']:,} rows, {facts['tokens']:,} tokens, {facts['trained_tokens']:,} trained, "
        f"{facts['skipped_rows']:,} skipped, fingerprint `{facts['fingerprint'][:16]}`"
        for name, facts in manifest["data"].items()
    ]
    lines += _memory(manifest)
    counts = ", ".join(f"{kind} {count:,}" for kind, count in manifest["adapter_parameters"].items())
    lines.append(f"- trained parameters: {counts}")
    lines.append("- environment: " + ", ".join(f"{key} {value}" for key, value in environment.items()))
    return "## Facts\n\n" + "\n".join(lines)


def _memory(manifest: dict[str, Any]) -> list[str]:
    """How the base was held and what updated the adapter, as far as the manifest says."""
    base = manifest["base"]
    lines = []
    parts = [
        f"{line['part']} {line['num_bytes'] / 2**20:,.1f} MiB {line['format']} on {line.get('device', 'one device')}"
        for line in base.get("storage", [])
    ]
    if parts:
        lines.append("- held in memory: " + ", ".join(parts))
    lines += [
        f"- **{part} were rounded to {held['format']}**, which changed them by {held['relative_rms']:.2%} (relative "
        "RMS): the adapter belongs to that base, not to the checkpoint as it is"
        for part, held in base.get("held_as", {}).items()
    ]
    if "optimizer" in manifest:
        lines.append(f"- {manifest['optimizer']}")
    return lines
