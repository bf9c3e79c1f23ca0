"""Heat maps as SVG, written by hand: no drawing library, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CELL, LEFT, TOP, LEGEND = 9, 44, 46, 40
LABEL_EVERY = 8
_BLUE, _RED, _WHITE = (8, 48, 107), (165, 15, 21), (255, 255, 255)


def heat_map(
    values: Sequence[Sequence[float]],
    *,
    title: str,
    rows: str,
    columns: str,
    most: float,
    diverging: bool = False,
) -> str:
    """Draw a table of numbers as coloured cells.

    Args:
        values: one sequence for each row, from the top; all equally long.
        title: above the map.
        rows, columns: what the axes count, such as `layer` and `expert`.
        most: the value of the darkest colour; larger ones look the same. White is 0.
        diverging: values go from -most (red) to most (blue) instead of from 0.
    """
    width, height = max(CELL * len(values[0]), _title_width(title)) + LEFT + 12, TOP + CELL * len(values) + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="10" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 16, title, size=12),
        _text(LEFT, 32, f"{columns} →"),
        _text(4, TOP - 4, f"{rows} ↓"),
    ]
    for number in range(0, len(values[0]), LABEL_EVERY):
        parts.append(_text(LEFT + CELL * number + CELL / 2, TOP - 4, str(number), anchor="middle"))
    for number, row in enumerate(values):
        y = TOP + CELL * number
        if number % max(1, LABEL_EVERY // 2) == 0:
            parts.append(_text(LEFT - 4, y + CELL - 1, str(number), anchor="end"))
        parts += [
            f'<rect x="{LEFT + CELL * place}" y="{y}" width="{CELL}" height="{CELL}" fill="{_colour(value, most)}"/>'
            for place, value in enumerate(row)
        ]
    parts += _legend(TOP + CELL * len(values) + 10, most, diverging=diverging)
    return "\n".join([*parts, "</svg>\n"])


def _legend(y: float, most: float, *, diverging: bool) -> list[str]:
    low = -most if diverging else 0.0
    steps = 20
    values = [low + (most - low) * step / steps for step in range(steps + 1)]
    cells = [
        f'<rect x="{LEFT + 5 * place}" y="{y}" width="5" height="8" fill="{_colour(value, most)}"/>'
        for place, value in enumerate(values)
    ]
    end = LEFT + 5 * (steps + 1)
    return [*cells, _text(LEFT, y + 19, f"{low:g}"), _text(end, y + 19, f"{most:g}", anchor="end")]


def _title_width(title: str) -> int:
    """Room that a title may take, in the drawing's units: maps of few experts are narrower than their title."""
    return max(240, 7 * len(title))


def _text(x: float, y: float, text: str, *, size: int = 10, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _colour(value: float, most: float) -> str:
    """White at 0, blue above it, red below; values that are no number are grey."""
    if value != value:
        return "#999999"
    share = min(1.0, abs(value) / most) if most else 0.0
    dark = _BLUE if value >= 0 else _RED
    return "#" + "".join(f"{round(w + (d - w) * share):02x}" for w, d in zip(_WHITE, dark, strict=True))
