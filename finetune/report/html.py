"""report.html: a run as one self-contained page, for a colleague who was not there.

No network, no script, nothing from data or model that is not escaped; the page's own policy forbids all of it too. Made
from the run directory alone, so it works on a run that is still going, was stopped, or died.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from finetune.config.differences import defaults, differences, in_words
from finetune.report.charts import Series, line_chart, smoothed
from finetune.report.evaluation_html import evaluation_html
from finetune.report.experts import FIGURES
from finetune.report.html_parts import bars, cards, picture, plain, rows_table, section, survival_table
from finetune.report.markdown import write_report
from finetune.report.read import RunFacts
from finetune.report.style import STYLE
from finetune.report.words import check_lines, summary, with_interval

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_ANSWERS_SHOWN = 6


def write_html(run: Path) -> Path:
    """Write report.html into a run directory, replacing an older one whole.

    Args:
        run: a run directory; what is missing or half-written is left out and said.

    Returns:
        The page's path.
    """
    facts = RunFacts.read(run)
    path = run / "report.html"
    staging = path.with_name("report.html.partial")
    staging.write_text(page(facts), encoding="utf-8")
    os.replace(staging, path)
    return path


def write_reports(run: Path) -> Path:
    """Write report.md, with its figures, and report.html.

    Returns:
        The page's path.
    """
    write_report(run)
    return write_html(run)


def page(facts: RunFacts) -> str:
    """The whole page."""
    title = f"Run {facts.path.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _guarded("", _summary, facts),
        _guarded("", _cards, facts),
        _guarded("", _warnings, facts),
        _guarded("Before and after", _evaluation, facts),
        _guarded("Training", _charts, facts),
        _guarded("Answers side by side", _answers, facts),
        _guarded("Experts", _experts, facts),
        _guarded("What was trained on", _data, facts),
        _guarded("The adapter", _adapter, facts),
        _guarded("Merged back to MXFP4", _survival, facts),
        _guarded("Checks", _checks, facts),
        _guarded("Configuration", _configuration, facts),
        _guarded("Environment", _environment, facts),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _guarded(title: str, make: Callable[[RunFacts], str], facts: RunFacts) -> str:
    """One part; a run of another version may hold other things than it expects, which must not cost the others."""
    try:
        content = make(facts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        content = (
            "<p class='warning'>This part cannot be made from the run's files, perhaps since another version wrote "
            f"them ({escape(type(error).__name__)}: {escape(str(error))}).</p>"
        )
    return section(title, content) if title else content


def _summary(facts: RunFacts) -> str:
    return f"<p>{escape(plain(summary(facts.manifest, facts.evaluation)))}</p>"


def _survival(facts: RunFacts) -> str:
    """For each merge: what came of it, the ways of serving compared, and its weights tensor by tensor."""
    parts = []
    for each in facts.survival:
        parts.append(f"<h3>{escape(each.target)}</h3><p>{escape(plain(each.text))}</p>")
        if each.rows:
            parts += [rows_table(each.head, each.rows), f"<p><small>{escape(each.note)}</small></p>"]
            parts.append(picture(each.svg.encode(), f"what survives in {each.target}"))
        weights = survival_table(each.weights)
        parts.append(f"<details><summary>weights, tensor by tensor</summary>{weights}</details>" if weights else "")
    return "".join(parts)


def _environment(facts: RunFacts) -> str:
    return rows_table((), sorted(facts.manifest.get("environment", {}).items()))


def _cards(facts: RunFacts) -> str:
    manifest, evaluation = facts.manifest, facts.evaluation
    found: list[tuple[str, str]] = []
    before, after = evaluation.get("before", {}), evaluation.get("after", {})
    for title, key in (("accuracy", "accuracy"), ("test loss", "loss")):
        if key in before and key in after:
            found.append((title, f"{before[key]:.3f} → {after[key]:.3f}"))
    steps = facts.lines("step")
    if steps:
        total = manifest.get("total_steps")
        found.append(("steps", f"{steps[-1]['step']:,}" + (f" of {total:,}" if isinstance(total, int) else "")))
    if "minutes" in manifest:
        found.append(("time", f"{manifest['minutes']} min"))
    if "peak_memory_gib" in manifest:
        found.append(("peak memory", f"{manifest['peak_memory_gib']} GiB"))
    speeds = sorted(line["tokens_per_second"] for line in facts.lines("step", "tokens_per_second"))
    if speeds:
        found.append(("median speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s"))
    return cards(found)


def _warnings(facts: RunFacts) -> str:
    texts = [str(text) for text in facts.manifest.get("warnings") or []]
    texts += [f"{name} could not be read and is left out" for name in facts.unreadable]
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in texts)


def _evaluation(facts: RunFacts) -> str:
    if facts.comparison:
        return evaluation_html(facts.comparison)
    shown = [when for when in ("before", "after") if when in facts.evaluation]
    if not shown:
        return ""
    first = facts.evaluation[shown[0]]
    titles = (("test loss, nats per trained token", "loss"), ("accuracy", "accuracy"))
    table = [
        (title, *(with_interval(facts.evaluation[when], key) for when in shown))
        for title, key in titles
        if key in first
    ]
    note = f"{first.get('rows')} test rows, {first.get('confidence', 0):.0%} intervals."
    if "best_constant_accuracy" in first:
        note += f" Always giving the most frequent answer is right for {first['best_constant_accuracy']:.3f}."
    return rows_table(("", *shown), table) + f"<p><small>{escape(note)}</small></p>"


def _charts(facts: RunFacts) -> str:
    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in facts.lines("step", key)]

    loss = points("loss")
    validation = [(line["step"], line["validation_loss"]) for line in facts.lines("evaluation", "validation_loss")]
    charts = [
        line_chart(
            "Loss, nats per trained token",
            [
                Series("each step", loss, "raw"),
                Series("smoothed", smoothed(loss)),
                Series("validation", validation, "dots"),
            ],
            "step",
        ),
        *(
            line_chart(title, [Series(title, points(key))], "step")
            for title, key in (
                ("Learning rate", "learning_rate"),
                ("Gradient norm before clipping", "gradient_norm"),
                ("Router balance loss (1 is uniform)", "balance_loss"),
                ("Speed, tokens per second", "tokens_per_second"),
                ("Peak memory, GiB", "memory_gib"),
            )
        ),
    ]
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else "<p>No step was made yet.</p>"


def _answers(facts: RunFacts) -> str:
    """What both models wrote on the same rows."""
    parts = []
    by_row: dict[int, dict[str, Any]] = {}
    for line in facts.answers:
        by_row.setdefault(int(line.get("row", 0)), {})[str(line.get("who"))] = line
    for row, found in list(by_row.items())[:_ANSWERS_SHOWN]:
        both = "".join(
            f"<div><small>{title}</small><pre>{escape(str(found[who].get('final') or '(no final text)'))}</pre></div>"
            for who, title in (("base", "base"), ("adapter", "base + adapter"))
            if who in found
        )
        line = next(iter(found.values()))
        asked, right = str(line.get("question") or ""), line.get("answer")
        question = f"<details><summary>what was asked</summary><pre>{escape(asked)}</pre></details>" if asked else ""
        expected = f" <small>(the answer is {escape(str(right))})</small>" if right is not None else ""
        parts.append(f'<h3>Row {row}{expected}</h3>{question}<div class="pair">{both}</div>')
    return "".join(parts)


def _experts(facts: RunFacts) -> str:
    """Heat maps that the run left: pictures, in which a browser runs nothing whatever they hold."""
    drawn = [
        picture(file.read_bytes(), file.stem.replace("_", " "))
        for file in sorted((facts.path / FIGURES).glob("experts_*.svg"), key=_map_order)
    ]
    if not drawn:
        return ""
    note = "1 is even use of a layer's experts; every number is in expert_usage.parquet, by channel and source."
    return f'<p><small>{note}</small></p><div class="pictures">{"".join(drawn)}</div>'


def _map_order(file: Path) -> tuple[int, str]:
    """Before, after and the change first, then the maps of channels and sources."""
    first = ("experts_before", "experts_after", "experts_change")
    return first.index(file.stem) if file.stem in first else len(first), file.stem


def _data(facts: RunFacts) -> str:
    table = [
        (name, *(f"{split.get(key, 0):,}" for key in ("rows", "tokens", "trained_tokens", "skipped_rows")))
        for name, split in facts.manifest.get("data", {}).items()
    ]
    text = rows_table(("split", "rows", "tokens", "trained", "skipped"), table)
    pieces = facts.sample.get("pieces") or []
    if pieces:
        marked = "".join(_piece(piece) for piece in pieces if isinstance(piece, dict))
        place = escape(str(facts.sample.get("where", "")))
        text += (
            f"<h3>One training sample <small>({place})</small></h3>"
            "<p><small>Marked text is trained, the rest is context.</small></p>"
            f'<pre class="sample">{marked}</pre>'
        )
    return text


def _piece(piece: Mapping[str, Any]) -> str:
    text = escape(str(piece.get("text", "")))
    return f"<mark>{text}</mark>" if piece.get("weight") else text


def _adapter(facts: RunFacts) -> str:
    counts = facts.manifest.get("adapter_parameters", {})
    text = rows_table(("part", "trained parameters"), [(kind, f"{count:,}") for kind, count in counts.items()])
    norms: dict[str, float] = facts.manifest.get("adapter_norms") or {}
    if norms:
        text += "<h3>Size of each update (norm of BA)</h3>" + bars(norms)
    return text


def _checks(facts: RunFacts) -> str:
    lines = [plain(line.removeprefix("- ")) for line in check_lines(facts.manifest)]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _configuration(facts: RunFacts) -> str:
    if not facts.config:
        return ""
    import yaml

    whole = yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True, width=110)
    changed = _changed(facts.config)
    overrides = ", ".join(f"<code>{escape(str(text))}</code>" for text in facts.manifest.get("overrides") or ())
    text = f"<p>Overrides on the command line: {overrides or 'none'}.</p>"
    if changed:
        text += "<h3>Not at its default</h3>" + rows_table(("key", "default", "here"), changed)
    return text + f"<details><summary>config.yaml</summary><pre class='config'>{escape(whole)}</pre></details>"


def _changed(config: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    try:
        found = differences(defaults(config), config)
    except (KeyError, TypeError, AttributeError):  # a run of another version: its keys may be others
        return ()
    return [(difference.key, in_words(difference.before), in_words(difference.after)) for difference in found]
