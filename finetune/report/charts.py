"""Line charts as plain SVG: no library, no script, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 34
MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        name: for the legend.
        points: (x, y) in order of x; y that is not finite is left out.
        style: CSS class: `raw` is thin and pale, `smooth` a line, `dots` has marks.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "smooth"


def line_chart(title: str, series: Sequence[Series], x_label: str) -> str:
    """An SVG figure with axes, or "" when there is nothing to draw.

    Args:
        title: what is drawn, with its unit.
        series: at least one line.
        x_label: under the axis.
    """
    lines = [Series(line.name, thinned(line.points), line.style) for line in series]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_range, y_ticks = _spread(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
    y_range = (min(y_ticks[0], *ys), max(y_ticks[-1], *ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT) + LEFT
        down = HEIGHT - BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
        return round(right, 1), round(down, 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_grid_line(tick, place(x_range[0], tick)[1]) for tick in y_ticks),
        *(
            _x_tick(tick, place(tick, y_range[0])[0])
            for tick in nice_ticks(*x_range)
            if x_range[0] <= tick <= x_range[1]
        ),
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>',
    ]
    for line in lines:
        places = [place(x, y) for x, y in line.points]
        parts.append(f'<polyline class="{line.style}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        if line.style == "dots":
            parts += [f'<circle class="dots" cx="{x}" cy="{y}" r="3"/>' for x, y in places]
    legend = ""
    if len(lines) > 1:
        names = " ".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in lines)
        legend = f'<p class="legend">{names}</p>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg>{legend}</figure>"


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: of each stretch the lowest and the highest, so that no spike is lost."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) <= most:
        return finite
    size = math.ceil(len(finite) * 2 / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(finite), size):
        stretch = finite[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def smoothed(points: Sequence[tuple[float, float]], memory: float = 0.9) -> list[tuple[float, float]]:
    """Exponential moving average, corrected for its start."""
    result, average, weight = [], 0.0, 0.0
    for x, y in points:
        if not math.isfinite(y):
            continue
        average, weight = memory * average + (1 - memory) * y, memory * weight + 1 - memory
        result.append((x, average / weight))
    return result


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span [low, high].

    >>> nice_ticks(0.3, 9.2)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    low, high = _spread(low, high)
    rough = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _spread(low: float, high: float) -> tuple[float, float]:
    """The range itself, or one around a single value."""
    if low < high:
        return low, high
    half = abs(low) / 10 or 1.0
    return low - half, high + half


def _grid_line(value: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>'
        f'<text class="axis" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{short(value)}</text>'
    )


def _x_tick(value: float, x: float) -> str:
    return f'<text class="axis" x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(value)}</text>'


def short(value: float) -> str:
    """A number in few characters.

    >>> short(12000), short(0.00025), short(2.5)
    ('12k', '2.5e-4', '2.5')
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
