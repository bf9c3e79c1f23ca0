"""The summary of `finetune evaluate` as a part of report.html: tables, confusion as a heat map, reliability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from finetune.report.evaluation_parts import evaluation_parts, introduction
from finetune.report.html_parts import plain, rows_table
from finetune.report.pieces import TITLES, Confusion, Piece, Reliability, Table
from finetune.report.reliability import reliability_diagram, reliability_rows

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
