"""Line charts, heat maps and reliability diagrams as plain SVG: no drawing library, no script, nothing fetched.

Colours of charts and diagrams come from the page's style sheet; heat maps are files of their own and carry theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from finetune.figures import MODELS, Model
from finetune.report.content import TITLES
from finetune.results import ReliabilityBin

MOST_POINTS = 400


@dataclass(frozen=True)
class Frame:
    """Size of a drawing and the margins around its axes."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Coordinates of a point; x and y are shares of the axes."""
        across = x * (self.width - self.left - self.right) + self.left
        down = self.height - self.bottom - y * (self.height - self.top - self.bottom)
        return round(across, 1), round(down, 1)


CHART = Frame(640, 240, 58, 14, 14, 34)
DIAGRAM = Frame(460, 380, 52, 14, 14, 44)

# Line charts


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: for the legend.
        points: (x, y) in order of x; y that is not finite is left out.
        style: CSS class: `raw` is thin and pale, `smooth` a plain line, `dots` has marks.
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
        share_x, share_y = (x - x_range[0]) / (x_range[1] - x_range[0]), (y - y_range[0]) / (y_range[1] - y_range[0])
        return CHART.place(share_x, share_y)

    parts = [
        f'<svg viewBox="0 0 {CHART.width} {CHART.height}" role="img" aria-label="{escape(title)}">',
        *(_grid_line(tick, place(x_range[0], tick)[1]) for tick in y_ticks),
        *(
            _x_tick(tick, place(tick, y_range[0])[0])
            for tick in nice_ticks(*x_range)
            if x_range[0] <= tick <= x_range[1]
        ),
        _axis_text(CHART.width - CHART.right, CHART.height - 4, escape(x_label), "end"),
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
        f'<line class="grid" x1="{CHART.left}" y1="{y}" x2="{CHART.width - CHART.right}" y2="{y}"/>'
        f"{_axis_text(CHART.left - 6, y + 4, short(value), 'end')}"
    )


def _x_tick(value: float, x: float) -> str:
    return _axis_text(x, CHART.height - CHART.bottom + 16, short(value), "middle")


def _axis_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="axis" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


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


# Heat maps

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
        _map_text(LEFT, 16, title, size=12),
        _map_text(LEFT, 32, f"{columns} →"),
        _map_text(4, TOP - 4, f"{rows} ↓"),
    ]
    for number in range(0, len(values[0]), LABEL_EVERY):
        parts.append(_map_text(LEFT + CELL * number + CELL / 2, TOP - 4, str(number), anchor="middle"))
    for number, row in enumerate(values):
        y = TOP + CELL * number
        if number % max(1, LABEL_EVERY // 2) == 0:
            parts.append(_map_text(LEFT - 4, y + CELL - 1, str(number), anchor="end"))
        parts += [
            f'<rect x="{LEFT + CELL * place}" y="{y}" width="{CELL}" height="{CELL}" fill="{_colour(value, most)}"/>'
            for place, value in enumerate(row)
        ]
    parts += _colour_scale(TOP + CELL * len(values) + 10, most, diverging=diverging)
    return "\n".join([*parts, "</svg>\n"])


def _colour_scale(y: float, most: float, *, diverging: bool) -> list[str]:
    low = -most if diverging else 0.0
    steps = 20
    values = [low + (most - low) * step / steps for step in range(steps + 1)]
    cells = [
        f'<rect x="{LEFT + 5 * place}" y="{y}" width="5" height="8" fill="{_colour(value, most)}"/>'
        for place, value in enumerate(values)
    ]
    end = LEFT + 5 * (steps + 1)
    return [*cells, _map_text(LEFT, y + 19, f"{low:g}"), _map_text(end, y + 19, f"{most:g}", anchor="end")]


def _title_width(title: str) -> int:
    """Room that a title may take, in the drawing's units: maps of few experts are narrower than their title."""
    return max(240, 7 * len(title))


def _map_text(x: float, y: float, text: str, *, size: int = 10, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _colour(value: float, most: float) -> str:
    """White at 0, blue above it, red below; values that are no number are grey."""
    if value != value:
        return "#999999"
    share = min(1.0, abs(value) / most) if most else 0.0
    dark = _BLUE if value >= 0 else _RED
    return "#" + "".join(f"{round(w + (d - w) * share):02x}" for w, d in zip(_WHITE, dark, strict=True))


# Reliability diagrams

_SMALLEST, _LARGEST = 3.0, 9.0


def reliability_diagram(title: str, bins: Mapping[Model, Sequence[ReliabilityBin]]) -> str:
    """An SVG figure: accuracy against confidence, before and after, with the diagonal of perfect calibration.

    Args:
        title: what is drawn.
        bins: by model. A bin's dot grows with its share of the examples, and a line spans its interval.
    """
    shown = [model for model in MODELS if bins.get(model)]
    if not shown:
        return ""
    ticks = [number / 5 for number in range(6)]
    (left, bottom), (right, top) = DIAGRAM.place(0, 0), DIAGRAM.place(1, 1)
    parts = [
        f'<svg viewBox="0 0 {DIAGRAM.width} {DIAGRAM.height}" role="img" aria-label="{escape(title)}">',
        *(_axis_tick(tick) for tick in ticks),
        f'<polyline class="ideal" points="{left},{bottom} {right},{top}"/>',
        _axis_text(DIAGRAM.width - DIAGRAM.right, DIAGRAM.height - 4, "confidence", "end"),
        _axis_text(DIAGRAM.left + 6, DIAGRAM.top + 12, "accuracy", "start"),
        *(part for model in shown for part in _reliability_line(model, bins[model])),
    ]
    names = "".join(f'<span class="key {model}">{TITLES[model]}</span>' for model in shown)
    legend = f'<p class="legend">{names}<span class="key ideal">confidence = accuracy</span></p>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg>{legend}</figure>"


def _reliability_line(model: Model, bins: Sequence[ReliabilityBin]) -> list[str]:
    total = sum(each.rows for each in bins)
    places = [DIAGRAM.place(each.confidence, each.accuracy) for each in bins]
    parts = []
    for each, (x, _) in zip(bins, places, strict=True):
        low, high = (DIAGRAM.place(each.confidence, end)[1] for end in (each.low, each.high))
        parts.append(f'<line class="{model} span" x1="{x}" y1="{low}" x2="{x}" y2="{high}"/>')
    parts.append(f'<polyline class="{model}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
    for each, (x, y) in zip(bins, places, strict=True):
        radius = round(_SMALLEST + (_LARGEST - _SMALLEST) * (each.rows / total) ** 0.5, 1)
        words = (
            f"{TITLES[model]}: {each.rows:,} examples, confidence {each.confidence:.3f}, accuracy {each.accuracy:.3f}"
        )
        parts.append(f'<circle class="{model}" cx="{x}" cy="{y}" r="{radius}"><title>{words}</title></circle>')
    return parts


def _axis_tick(value: float) -> str:
    """A grid line and its number, on both axes."""
    (left, y), (x, bottom) = DIAGRAM.place(0, value), DIAGRAM.place(value, 0)
    return (
        f'<line class="grid" x1="{left}" y1="{y}" x2="{DIAGRAM.width - DIAGRAM.right}" y2="{y}"/>'
        + _axis_text(left - 6, y + 4, f"{value:g}", "end")
        + _axis_text(x, bottom + 16, f"{value:g}", "middle")
    )
