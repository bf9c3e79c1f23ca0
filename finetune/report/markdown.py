"""report.md, README.md of an evaluation and the lines on the terminal: results as Markdown and text.

Made from a run's files alone, so it works on a run that is still going or was stopped: what is missing is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.figures import MODELS
from finetune.files import JsonObject, write_text
from finetune.markdown import code, escaped
from finetune.report.content import (
    TITLES,
    Confusion,
    Piece,
    Reliability,
    Table,
    evaluation_parts,
    introduction,
    reliability_rows,
)
from finetune.report.experts import experts_section
from finetune.report.read import RunFiles
from finetune.report.survival import survival_section
from finetune.results import Evaluation, to_json

NUM_CURVE_POINTS = 12


def write_report(run: Path) -> Path:
    """Write report.md.

    Args:
        run: a run directory; files that are missing or half-written are left out.

    Returns:
        The report's path.
    """
    files = RunFiles.read(run)
    manifest = files.manifest
    makers: list[Callable[[], str]] = [
        lambda: summary(manifest, files.trained),
        lambda: _evaluation(files.trained),
        lambda: survival_section(files.survival, run),
        lambda: _training(files),
        lambda: experts_section(run, manifest),
        lambda: _checks(files),
        lambda: _figures(manifest),
        lambda: _configuration(manifest),
    ]
    sections = [f"# Run {escaped(run.name)}", *map(_section, makers)]
    path = run / "report.md"
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _section(make: Callable[[], str]) -> str:
    """One section; another version's run may differ in what it needs, which must not cost the others."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"*This part cannot be made from the run's files ({escaped(f'{type(error).__name__}: {error}')}).*"


def _checks(files: RunFiles) -> str:
    lines = check_lines(files.manifest) + [f"- **{escaped(text)}**" for text in files.unreadable]
    return "## Checks\n\n" + "\n".join(lines) if lines else ""


def _configuration(manifest: JsonObject) -> str:
    overrides = ", ".join(code(text) for text in manifest.get("overrides", [])) or "none"
    return f"## Configuration\n\nThe whole of it is in `config.yaml`; overrides on the command line: {overrides}."


def outcome(run: Path) -> str:
    """Summarise a finished run's gain and the places of its files, in a few lines for the terminal."""
    files = RunFiles.read(run)
    manifest = files.manifest
    lines = [f"finished in {manifest.get('minutes')} minutes, at most {manifest.get('peak_memory_gib')} GiB"]
    for title, figures in files.trained.headlines() if files.trained else []:
        if figures.base and figures.adapter:
            lines.append(f"  {title:<10} {figures.base.headline()} -> {figures.adapter.headline()}")
    lines += [f"  report     {run / 'report.html'}", f"  adapter    {run / 'adapter'}"]
    lines.append(f'  next       finetune generate {run} "..."; finetune export {run} --to peft')
    return "\n".join(lines)


def outcome_record(run: Path) -> JsonObject:
    """The content of `outcome`, and evaluation.json, as JSON data."""
    files = RunFiles.read(run)
    figures = {key: files.manifest.get(key) for key in ("status", "minutes", "peak_memory_gib", "total_steps")}
    places = {"run": str(run), "report": str(run / "report.html"), "adapter": str(run / "adapter")}
    return {**places, **figures, "evaluation": to_json(files.trained) if files.trained else {}}


def summary(manifest: JsonObject, evaluation: Evaluation | None) -> str:
    """Summarise a run in a few sentences of Markdown."""
    status = manifest.get("status", "unknown")
    parts = [f"Recipe {code(manifest.get('recipe', '?'))}, status: **{status}**."]
    if stopped := manifest.get("stopped_by"):
        parts.append(f"It was stopped by {code(stopped)}.")
    if "minutes" in manifest:
        parts.append(f"Took {manifest['minutes']} minutes and at most {manifest['peak_memory_gib']} GiB.")
    for title, figures in evaluation.headlines() if evaluation else []:
        if figures.base and figures.adapter:
            unit = " nats per trained token" if title == "test loss" else ""
            parts.append(
                f"{title.capitalize()} went from {figures.base.value:.3f} to {figures.adapter.value:.3f}{unit}."
            )
    return " ".join(parts)


def check_lines(manifest: JsonObject) -> list[str]:
    """The checks of a run, as items of a Markdown list."""
    lines = [f"- {escaped(str(line))}" for line in manifest.get("audit") or []]
    match manifest.get("read_back"):
        case {"skipped": reason}:
            lines.append(f"- **not read back** with stock PEFT: {escaped(str(reason))}")
        case {"conclusive": False, "effect_kl": effect, "mean_kl": found}:
            lines.append(
                f"- read back by stock PEFT, **inconclusive**: the adapter changes so little (KL {effect:.1e}) that "
                f"ignoring it would hardly show (KL {found:.1e} found)"
            )
        case {"max_difference": difference, "effect": effect, "samples": samples}:
            lines.append(
                f"- read back by stock PEFT in a fresh process: logits differ by {difference:.1e} at most on {samples} "
                f"examples (the adapter itself moves them by {effect:.1f})"
            )
    if "adapter_of_step" in manifest:
        lines.append(f"- the adapter is the one of step {manifest['adapter_of_step']} (best validation loss)")
    return lines


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None or evaluation.test is None:
        return ""
    test = evaluation.test
    shown = [model for model in MODELS if evaluation.has(model)]
    columns = {"base": "before (base alone)", "adapter": "after"}
    titles = {
        "test loss": "test loss (nats per trained token)",
        "accuracy": "label accuracy",
        "pair accuracy": "pair accuracy",
    }
    table = Table(
        ("", *(columns[model] for model in shown)),
        [
            (titles[title], *(figure.headline() for model in shown if (figure := figures.of(model))))
            for title, figures in evaluation.headlines()
        ],
    )
    note = f"{test.rows} test examples, {evaluation.confidence:.0%} intervals"
    if (pairs := test.pairs) is not None:
        note += f"; {pairs.pairs} pairs of answers by log-probability"
        if pairs.reward_accuracy:
            note += f"; the better one gained more over the base in {pairs.reward_accuracy.text()}"
        if pairs.shorter_wins:
            note += f"; preferring the shorter answer is right for {pairs.shorter_wins.text()}"
        if pairs.shuffled and pairs.shuffled.adapter:
            note += f"; with prompts shuffled among records the adapter is right for {pairs.shuffled.adapter.text()}"
    if test.num_labels is not None:
        note += (
            f"; labels scored by likelihood among {test.num_labels}, "
            f"always giving the most frequent one scores {test.best_constant:.3f}"
        )
    return f"## Before and after\n\n{_table(table)}\n\n{note}."


def _training(files: RunFiles) -> str:
    steps = [line for line in files.metrics if line.get("kind") == "step"]
    if not steps:
        return "## Training\n\nNo step was made yet."
    every = max(1, len(steps) // NUM_CURVE_POINTS)
    shown = [*steps[::every], *([steps[-1]] if (len(steps) - 1) % every else [])]
    validations = {line["step"]: line["validation_loss"] for line in files.metrics if line.get("kind") == "evaluation"}
    others = files.other_terms()
    head = ("step", "loss", "balance", "gradient norm", "learning rate", "tokens/s", "memory GiB", *others)
    keys = ("step", "loss", "balance_loss", "gradient_norm", "learning_rate", "tokens_per_second", "memory_gib")
    forms = ("d", ".4f", ".3f", ".3f", ".2e", ",.0f", ".2f")
    rows = [[format(step[key], form) for key, form in zip(keys, forms, strict=True)] for step in shown]
    for row, step in zip(rows, shown, strict=True):
        row += [format(step[name], ".4f") if name in step else "" for name in others]
    text = f"## Training\n\n{_table(Table(head, rows))}"
    if validations:
        best = min(validations, key=lambda step: validations[step])
        text += "\n\nValidation loss: " + ", ".join(f"{loss:.4f} (step {step})" for step, loss in validations.items())
        text += f"; best at step {best}."
    return text


def _figures(manifest: JsonObject) -> str:
    """Base, data, memory, parameters and environment."""
    if "base" not in manifest:
        return ""
    base, environment = manifest["base"], manifest["environment"]
    revision = escaped(base["revision"] or "none")
    lines = [f"- base: {code(base['name'])}, revision {revision}, identity `{base['identity'][:16]}`"]
    lines += [
        f"- data, {name}: {split['rows']:,} examples, {split['tokens']:,} tokens, {split['trained_tokens']:,} trained, "
        f"{split['skipped_rows']:,} skipped, fingerprint `{split['fingerprint'][:16]}`"
        for name, split in manifest["data"].items()
    ]
    lines += [
        f"- **data, {name}**: {escaped(line)}"
        for name, split in manifest["data"].items()
        for line in split.get("control_text", [])
    ]
    lines += _memory(manifest)
    counts = ", ".join(f"{kind} {count:,}" for kind, count in manifest["adapter_parameters"].items())
    lines.append(f"- trained parameters: {counts}")
    lines.append("- environment: " + ", ".join(f"{key} {value}" for key, value in environment.items()))
    return "## Facts\n\n" + "\n".join(lines)


def _memory(manifest: JsonObject) -> list[str]:
    """Describe the base's storage and the optimiser, as far as the manifest records them."""
    base = manifest["base"]
    lines = []
    parts = [
        f"{line['part']} {line['num_bytes'] / 2**20:,.1f} MiB {line['format']} on {line.get('device', 'one device')}"
        for line in base.get("storage", [])
    ]
    if parts:
        lines.append("- stored in memory: " + ", ".join(parts))
    lines += [
        f"- **{part} were rounded to {stored['format']}**, which changed them by {stored['relative_rms']:.2%} "
        "(relative RMS): the adapter belongs to that base, not to the checkpoint as it is"
        for part, stored in base.get("held_as", {}).items()
    ]
    if "optimizer" in manifest:
        lines.append(f"- {manifest['optimizer']}")
    return lines


# The README of an evaluation


def describe_evaluation(evaluation: Evaluation, *, details: bool = True) -> str:
    """Results as Markdown.

    Args:
        evaluation: of `finetune evaluate`.
        details: with the long tables: calibration, confusion, each label's own figures.
    """
    blocks = [f"# {code(evaluation.adapter)} against its base", introduction(evaluation)]
    for part in evaluation_parts(evaluation):
        blocks += [f"## {escaped(part.title)}", *map(_markdown, [*part.content, *(part.details if details else ())])]
    return "\n\n".join(blocks) + "\n"


def _markdown(piece: Piece) -> str:
    match piece:
        case str():
            return piece
        case Table():
            return _table(piece)
        case Confusion():
            note = "A row for each own label, a column for each chosen one."
            return f"### {piece.title}\n\n{note}\n\n{_numbered(piece)}"
        case Reliability():
            head = ("confidence", "examples", "mean confidence", "accuracy")
            tables = (
                f"### Calibration ({TITLES[model]})\n\n{_table(Table(head, reliability_rows(bins)))}"
                for model, bins in piece.bins.items()
            )
            return "\n\n".join(tables)


def _table(table: Table) -> str:
    name = _code_cell if table.names else escaped
    return _lines(table.head, [[name(row[0]), *row[1:]] for row in table.rows])


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code_cell(text: str) -> str:
    """Code in a cell, which a bar would end even in code."""
    return code(text).replace("|", "\\|")


def _numbered(found: Confusion) -> str:
    """A confusion table whose columns are headed by the labels' numbers: names would make them far too wide."""
    numbers = [str(number) for number in range(1, len(found.labels) + 1)]
    rows = [
        (f"{number}. {_code_cell(label)}", *map(str, counts))
        for number, label, counts in zip(numbers, found.labels, found.counts, strict=True)
    ]
    return _lines(("", *numbers), rows)
