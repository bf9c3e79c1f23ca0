"""The summary of `finetune evaluate` in words and tables, as Markdown."""

from __future__ import annotations

from typing import Any

from finetune.report.evaluation_parts import evaluation_parts, introduction
from finetune.report.pieces import TITLES, Confusion, Piece, Reliability, Table
from finetune.report.reliability import reliability_rows
from finetune.report.words import code


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
