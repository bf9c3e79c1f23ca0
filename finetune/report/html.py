"""report.html: a run as one self-contained page, for a colleague who was not there.

Made from the run directory alone, so it works on a run that is still going, was stopped, or died. The page loads
nothing, and the templates escape every text from data or model.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from finetune.config.differences import ABSENT, as_typed, defaults, differences
from finetune.config.fields import Plain
from finetune.figures import MODELS, Model
from finetune.files import JsonObject, write_text
from finetune.report.charts import Series, line_chart, reliability_diagram, smoothed
from finetune.report.content import TITLES, evaluation_parts, introduction, plain, reliability_rows
from finetune.report.experts import FIGURES
from finetune.report.markdown import check_lines, summary, write_report
from finetune.report.read import RunFiles, ShownAnswer
from finetune.results import ReliabilityBin

_ANSWERS_SHOWN = 6
_NUMBER = re.compile(r"[+-]?[\d,]+(\.\d+)?(e[+-]?\d+)?%?")
Arguments = JsonObject
"""Arguments of a section's macro."""
Bins = Mapping[Model, Sequence[ReliabilityBin]]


def write_html(run: Path) -> Path:
    """Write report.html into a run directory, replacing an older one.

    Args:
        run: a run directory; files that are missing or half-written are left out, and named on the page.

    Returns:
        The page's path.
    """
    path = run / "report.html"
    write_text(path, page(RunFiles.read(run)))
    return path


def write_reports(run: Path) -> Path:
    """Write report.md, with its figures, and report.html.

    Returns:
        The page's path.
    """
    write_report(run)
    return write_html(run)


@dataclass(frozen=True)
class Section:
    """A section of the page; without a title it has no heading."""

    title: str
    content: Markup


def page(run: RunFiles) -> str:
    """The whole page."""
    sections = [
        _section(run, "", "summary", _summary),
        _section(run, "", "cards", _cards),
        _section(run, "", "warnings", _warnings),
        _section(run, "Before and after", "evaluation", _evaluation),
        _section(run, "Training", "charts", _charts),
        _section(run, "Answers side by side", "answers", _answers),
        _section(run, "Experts", "experts", _experts),
        _section(run, "What was trained on", "data", _data),
        _section(run, "The adapter", "adapter", _adapter),
        _section(run, "Merged back to MXFP4", "survival", _survival),
        _section(run, "Checks", "checks", _checks),
        _section(run, "Configuration", "configuration", _configuration),
        _section(run, "Environment", "environment", _environment),
    ]
    return _TEMPLATES.get_template("page.html.j2").render(title=f"Run {run.path.name}", sections=sections)


def _section(run: RunFiles, title: str, macro: str, arguments: Callable[[RunFiles], Arguments | None]) -> Section:
    """Render one section; another version's run may differ in what it needs, which must not cost the others."""
    macros = _TEMPLATES.get_template("sections.html.j2").module
    try:
        found = arguments(run)
        content = Markup("") if found is None else getattr(macros, macro)(**found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, TemplateError) as error:
        content = macros.failed(f"{type(error).__name__}: {error}")  # type: ignore[attr-defined]
    return Section(title, content.strip())


def _number_columns(rows: Sequence[Sequence[Any]]) -> list[bool]:
    """Whether each column holds nothing but numbers."""
    return [all(_NUMBER.fullmatch(str(cell)) for cell in column) for column in zip(*rows, strict=True)]


def _environment_of_templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("finetune.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    filters = (plain, _base64, _number_columns, _bin_rows, _calibration, _model_title)
    environment.filters |= {made.__name__.lstrip("_"): made for made in filters}
    return environment


def _model_title(model: str) -> str:
    return TITLES[model]


def _base64(svg: bytes) -> str:
    return base64.b64encode(svg).decode()


def _bin_rows(bins: Bins) -> list[tuple[str, ...]]:
    return [(TITLES[model], *row) for model in MODELS for row in reliability_rows(bins[model])]


def _calibration(bins: Bins) -> Markup:
    return Markup(reliability_diagram("Calibration: accuracy of the examples at each confidence", bins))


_TEMPLATES = _environment_of_templates()


# Arguments of the sections' macros; None where there is nothing to show


def _summary(run: RunFiles) -> Arguments:
    return {"text": summary(run.manifest, run.trained)}


def _cards(run: RunFiles) -> Arguments | None:
    manifest = run.manifest
    found: list[tuple[str, str]] = []
    for title, figures in reversed(run.trained.headlines() if run.trained else []):
        if figures.base and figures.adapter:
            found.append((title, f"{figures.base.value:.3f} → {figures.adapter.value:.3f}"))
    steps = run.lines("step")
    if steps:
        total = manifest.get("total_steps")
        found.append(("steps", f"{steps[-1]['step']:,}" + (f" of {total:,}" if isinstance(total, int) else "")))
    if "minutes" in manifest:
        found.append(("time", f"{manifest['minutes']} min"))
    if "peak_memory_gib" in manifest:
        found.append(("peak memory", f"{manifest['peak_memory_gib']} GiB"))
    speeds = sorted(line["tokens_per_second"] for line in run.lines("step", "tokens_per_second"))
    if speeds:
        found.append(("median speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s"))
    return {"found": found} if found else None


def _warnings(run: RunFiles) -> Arguments:
    texts = [str(text) for text in run.manifest.get("warnings") or []]
    return {"texts": texts + run.unreadable}


def _evaluation(run: RunFiles) -> Arguments | None:
    evaluation = run.compared or run.trained
    if evaluation is None:
        return None
    return {"introduction": introduction(evaluation), "parts": evaluation_parts(evaluation)}


def _charts(run: RunFiles) -> Arguments:
    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in run.lines("step", key)]

    loss = points("loss")
    validation = [(line["step"], line["validation_loss"]) for line in run.lines("evaluation", "validation_loss")]
    lines = [
        Series("each step", loss, "raw"),
        Series("smoothed", smoothed(loss)),
        Series("validation", validation, "dots"),
    ]
    drawings = [line_chart("Loss, nats per trained token", lines, "step")]
    for title, key in (
        ("Learning rate", "learning_rate"),
        ("Gradient norm before clipping", "gradient_norm"),
        ("Router balance loss (1 is uniform)", "balance_loss"),
        ("Speed, tokens per second", "tokens_per_second"),
        ("Peak memory, GiB", "memory_gib"),
        *((name, name) for name in run.other_terms()),
    ):
        drawings.append(line_chart(title, [Series(title, points(key))], "step"))
    return {"drawings": [Markup(drawing) for drawing in drawings if drawing]}


def _answers(run: RunFiles) -> Arguments | None:
    by_row: dict[int, list[ShownAnswer]] = {}
    for answer in run.answers:
        by_row.setdefault(answer.row, []).append(answer)
    shown = list(by_row.values())[:_ANSWERS_SHOWN]
    return {"examples": [sorted(found, key=lambda one: MODELS.index(one.who)) for found in shown]} if shown else None


def _experts(run: RunFiles) -> Arguments | None:
    """Heat maps that the run has written."""
    files = sorted((run.path / FIGURES).glob("experts_*.svg"), key=_map_order)
    return {"maps": [(file.stem.replace("_", " "), file.read_bytes()) for file in files]} if files else None


def _map_order(file: Path) -> tuple[int, str]:
    """Before, after and the change first, then the maps of channels and sources."""
    first = ("experts_before", "experts_after", "experts_change")
    return first.index(file.stem) if file.stem in first else len(first), file.stem


def _data(run: RunFiles) -> Arguments:
    data = run.manifest.get("data", {})
    keys = ("rows", "tokens", "trained_tokens", "skipped_rows")
    splits = [(name, *(f"{split.get(key, 0):,}" for key in keys)) for name, split in data.items()]
    notes = [f"{name}: {line}" for name, split in data.items() for line in split.get("control_text", [])]
    return {"splits": splits, "notes": notes, "example": run.example}


def _adapter(run: RunFiles) -> Arguments:
    counts = run.manifest.get("adapter_parameters", {})
    norms: dict[str, float] = run.manifest.get("adapter_norms") or {}
    return {"counts": [(part, f"{count:,}") for part, count in counts.items()], "norms": list(norms.items())}


def _survival(run: RunFiles) -> Arguments:
    """Each merge: the ways of serving compared, and its weights tensor by tensor."""
    return {"merges": [(merge, merge.svg.encode()) for merge in run.survival]}


def _checks(run: RunFiles) -> Arguments | None:
    lines = [line.removeprefix("- ") for line in check_lines(run.manifest)]
    return {"lines": lines} if lines else None


def _configuration(run: RunFiles) -> Arguments | None:
    if not run.config:
        return None
    import yaml

    return {
        "overrides": [str(text) for text in run.manifest.get("overrides") or ()],
        "changed": _changed(dict(run.config)),
        "whole": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=110),
    }


def _changed(config: Plain) -> Sequence[tuple[str, str, str]]:
    try:
        found = differences(defaults(config), config)
    except (KeyError, TypeError, AttributeError):  # a run of another version: its keys may be others
        return ()
    present = [each for each in found if each.after != ABSENT]  # an older version's config.yaml lacks newer keys
    return [(each.key, as_typed(each.before), as_typed(each.after)) for each in present]


def _environment(run: RunFiles) -> Arguments:
    return {"rows": sorted(run.manifest.get("environment", {}).items())}
