"""Pieces of the HTML report; every text is escaped here or was made by this package."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from finetune.config.differences import as_typed, defaults, differences
from finetune.files import write_text
from finetune.report.charts import Series, line_chart, smoothed
from finetune.report.content import (
    TITLES,
    Confusion,
    Piece,
    Reliability,
    Table,
    check_lines,
    evaluation_parts,
    introduction,
    summary,
    with_interval,
)
from finetune.report.experts import FIGURES
from finetune.report.markdown import write_report
from finetune.report.read import RunFiles
from finetune.report.reliability import reliability_diagram, reliability_rows
from finetune.report.style import STYLE

_NUMBER = re.compile(r"[+-]?[\d,]+(\.\d+)?(e[+-]?\d+)?%?")


def section(title: str, content: str) -> str:
    """A heading and what belongs under it; "" without content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def cards(found: Iterable[tuple[str, str]]) -> str:
    """Large figures with small titles."""
    drawn = "".join(
        f'<div class="card"><small>{escape(title)}</small><b>{escape(text)}</b></div>' for title, text in found
    )
    return f'<div class="cards">{drawn}</div>' if drawn else ""


def rows_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of texts; columns of nothing but numbers stand on the right. "" without rows."""
    texts = [[str(value) for value in row] for row in rows]
    if not texts:
        return ""
    on_the_right = [all(map(_NUMBER.fullmatch, column)) for column in zip(*texts, strict=True)]

    def line(tag: str, cells: Sequence[str]) -> str:
        starts = (f'<{tag} class="number">' if right else f"<{tag}>" for right in on_the_right)
        return (
            "<tr>"
            + "".join(f"{start}{escape(cell)}</{tag}>" for start, cell in zip(starts, cells, strict=True))
            + "</tr>"
        )

    head = f"<thead>{line('th', titles)}</thead>" if titles else ""
    body = "".join(line("td", row) for row in texts)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def bars(values: Mapping[str, float]) -> str:
    """A bar for each named value, all on one scale."""
    largest = max(values.values(), default=0.0) or 1.0
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td class='number'>{value:.3g}</td>"
        f'<td style="width:45%"><span class="bar" style="width:{100 * value / largest:.1f}%"></span></td></tr>'
        for name, value in values.items()
    )
    return f'<details><summary>{len(values)} weights</summary><div class="scroll"><table>{rows}</table></div></details>'


def picture(svg: bytes, title: str) -> str:
    """An SVG file as a picture, in which a browser runs and loads nothing, whatever it holds."""
    data = base64.b64encode(svg).decode()
    return f'<figure class="picture"><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></figure>'


def plain(markdown: str) -> str:
    """A sentence of the Markdown report without its marks."""
    return markdown.replace("`", "").replace("**", "")


def survival_table(survival: Mapping[str, Any]) -> str:
    """What of the update is in a merged MXFP4 export, tensor by tensor."""
    tensors = survival.get("tensors") or {}
    rows = [
        (name, f"{figures['update']:.2%}", f"{figures['survival']:.1%}", f"{figures['error']:.2f}")
        for name, figures in [*tensors.items(), ("overall", survival.get("overall"))]
        if isinstance(figures, Mapping) and {"update", "survival", "error"} <= figures.keys()
    ]
    return rows_table(("expert tensor", "update, of the weights", "survives", "error, of the update"), rows)


# The summary of `finetune evaluate` as a part of report.html: tables, confusion as a heat map, reliability.

_RIGHT, _WRONG = "31 111 235", "200 50 35"
_DARKEST = 0.6  # of the colour: text stays readable on it, on a light page and on a dark one


def evaluation_html(summary: Mapping[str, Any]) -> str:
    """HTML of a `summary.json`, every text escaped."""
    blocks = [_paragraph(introduction(summary))]
    for part in evaluation_parts(summary):
        blocks += [f"<h3>{escape(part.title)}</h3>", *map(_html, part.content)]
        details = "".join(map(_html, part.details))
        if details and part.folded:
            details = f"<details><summary>calibration, confusion and each label</summary>{details}</details>"
        blocks.append(details)
    return "".join(blocks)


def _html(piece: Piece) -> str:
    match piece:
        case str():
            return _paragraph(piece)
        case Table():
            return rows_table(piece.head, piece.rows)
        case Confusion():
            return _heat_table(piece)
        case Reliability():
            return _reliability(piece)


def _paragraph(text: str) -> str:
    return f"<p>{escape(plain(text))}</p>"


def _reliability(found: Reliability) -> str:
    drawn = reliability_diagram("Calibration: accuracy of the rows given a confidence", found.bins)
    if not drawn:
        return ""
    rows = [(TITLES[who], *row) for who, bins in found.bins.items() for row in reliability_rows(bins)]
    table = rows_table(("", "confidence", "rows", "mean confidence", "accuracy"), rows)
    note = (
        "On the pale dotted line confidence equals accuracy; under it the model is surer than it is right. Large dots "
        f"stand for many rows; a line is the {found.confidence:.0%} interval of a dot's accuracy."
    )
    return (
        f'<div class="reliability">{drawn}</div><p><small>{note}</small></p>'
        f"<details><summary>the bins as a table</summary>{table}</details>"
    )


def _heat_table(found: Confusion) -> str:
    """A table whose cells are the darker, the larger their share of their row: right ones blue, wrong ones red."""
    columns = "".join(f'<th scope="col"><span>{escape(label)}</span></th>' for label in found.labels)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>{_cells(number, counts)}</tr>'
        for number, (label, counts) in enumerate(zip(found.labels, found.counts, strict=True))
    )
    note = (
        "A row for each own label, a column for each chosen one; the number of rows in each cell, darker the larger "
        "its share of its row. Blue is right, red is wrong."
    )
    title = escape(found.title)
    drawn = (
        f'<p><small>{note}</small></p><div class="scroll" role="region" tabindex="0" aria-label="{title}">'
        f'<table class="heat"><thead><tr><td></td>{columns}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    return f"<details><summary>{title}</summary>{drawn}</details>" if found.folded else f"<h4>{title}</h4>{drawn}"


def _cells(row: int, counts: Sequence[int]) -> str:
    total = max(1, sum(counts))
    cells = []
    for column, count in enumerate(counts):
        own = ' class="own"' if column == row else ""
        share = _DARKEST * count / total
        colour = f' style="background:rgb({_RIGHT if own else _WRONG} / {share:.2f})"' if count else ' data-zero=""'
        cells.append(f"<td{own}{colour}>{count}</td>")
    return "".join(cells)


# report.html: a run as one self-contained page, for a colleague who was not there.
#
# No network, no script, nothing from data or model that is not escaped; the page's own policy forbids all of it too.
# Made from the run directory alone, so it works on a run that is still going, was stopped, or died.

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_ANSWERS_SHOWN = 6


def write_html(run: Path) -> Path:
    """Write report.html into a run directory, replacing an older one whole.

    Args:
        run: a run directory; what is missing or half-written is left out and said.

    Returns:
        The page's path.
    """
    facts = RunFiles.read(run)
    path = run / "report.html"
    write_text(path, page(facts))
    return path


def write_reports(run: Path) -> Path:
    """Write report.md, with its figures, and report.html.

    Returns:
        The page's path.
    """
    write_report(run)
    return write_html(run)


def page(facts: RunFiles) -> str:
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


def _guarded(title: str, make: Callable[[RunFiles], str], facts: RunFiles) -> str:
    """One part; a run of another version may hold other things than it expects, which must not cost the others."""
    try:
        content = make(facts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        content = (
            "<p class='warning'>This part cannot be made from the run's files, perhaps since another version wrote "
            f"them ({escape(type(error).__name__)}: {escape(str(error))}).</p>"
        )
    return section(title, content) if title else content


def _summary(facts: RunFiles) -> str:
    return f"<p>{escape(plain(summary(facts.manifest, facts.evaluation)))}</p>"


def _survival(facts: RunFiles) -> str:
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


def _environment(facts: RunFiles) -> str:
    return rows_table((), sorted(facts.manifest.get("environment", {}).items()))


def _cards(facts: RunFiles) -> str:
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


def _warnings(facts: RunFiles) -> str:
    texts = [str(text) for text in facts.manifest.get("warnings") or []]
    texts += [f"{name} could not be read and is left out" for name in facts.unreadable]
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in texts)


def _evaluation(facts: RunFiles) -> str:
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


def _charts(facts: RunFiles) -> str:
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


def _answers(facts: RunFiles) -> str:
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


def _experts(facts: RunFiles) -> str:
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


def _data(facts: RunFiles) -> str:
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


def _adapter(facts: RunFiles) -> str:
    counts = facts.manifest.get("adapter_parameters", {})
    text = rows_table(("part", "trained parameters"), [(kind, f"{count:,}") for kind, count in counts.items()])
    norms: dict[str, float] = facts.manifest.get("adapter_norms") or {}
    if norms:
        text += "<h3>Size of each update (norm of BA)</h3>" + bars(norms)
    return text


def _checks(facts: RunFiles) -> str:
    lines = [plain(line.removeprefix("- ")) for line in check_lines(facts.manifest)]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _configuration(facts: RunFiles) -> str:
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
    return [(difference.key, as_typed(difference.before), as_typed(difference.after)) for difference in found]
