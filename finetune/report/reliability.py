"""How far confidence can be believed: a reliability diagram as plain SVG, and its numbers as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from finetune.report.content import TITLES, WHO

NUM_BINS = 10
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 380, 52, 14, 14, 44
_SMALLEST, _LARGEST = 3.0, 9.0
Bins = Sequence[Sequence[float]]


def reliability_rows(bins: Bins) -> list[tuple[str, str, str, str]]:
    """Each bin as texts: its range of confidence, its rows, their mean confidence and their accuracy.

    Args:
        bins: rows, accuracy, mean confidence and, in newer summaries, the ends of the accuracy's interval.
    """
    rows = []
    for count, accuracy, sure, *ends in bins:
        number = min(int(sure * NUM_BINS), NUM_BINS - 1)
        interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
        span = f"{number / NUM_BINS:.1f} to {(number + 1) / NUM_BINS:.1f}"
        rows.append((span, f"{count:,.0f}", f"{sure:.3f}", f"{accuracy:.3f}{interval}"))
    return rows


def reliability_diagram(title: str, bins: Mapping[str, Bins]) -> str:
    """An SVG figure: accuracy against confidence, before and after, with the diagonal of perfect calibration.

    Args:
        title: what is drawn.
        bins: by `base` and `adapter`, as for `reliability_rows`. A bin's dot grows with its share of the rows, and a
            line spans its interval.
    """
    shown = [who for who in WHO if bins.get(who)]
    if not shown:
        return ""
    ticks = [number / 5 for number in range(6)]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_tick(tick) for tick in ticks),
        f'<polyline class="ideal" points="{_at(0, 0)} {_at(1, 1)}"/>',
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">confidence</text>',
        f'<text class="axis" x="{LEFT + 6}" y="{TOP + 12}">accuracy</text>',
        *(part for who in shown for part in _model(who, bins[who])),
    ]
    names = "".join(f'<span class="key {who}">{TITLES[who]}</span>' for who in shown)
    legend = f'<p class="legend">{names}<span class="key ideal">confidence = accuracy</span></p>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg>{legend}</figure>"


def _model(who: str, bins: Bins) -> list[str]:
    total = sum(each[0] for each in bins)
    places = [_place(sure, accuracy) for _, accuracy, sure, *_ in bins]
    parts = []
    for (_, _, sure, *ends), (x, _) in zip(bins, places, strict=True):
        if ends:
            low, high = (_place(sure, end)[1] for end in ends[:2])
            parts.append(f'<line class="{who} span" x1="{x}" y1="{low}" x2="{x}" y2="{high}"/>')
    parts.append(f'<polyline class="{who}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
    for (count, accuracy, sure, *_), (x, y) in zip(bins, places, strict=True):
        radius = round(_SMALLEST + (_LARGEST - _SMALLEST) * (count / total) ** 0.5, 1)
        words = f"{TITLES[who]}: {count:,.0f} rows, confidence {sure:.3f}, accuracy {accuracy:.3f}"
        parts.append(f'<circle class="{who}" cx="{x}" cy="{y}" r="{radius}"><title>{words}</title></circle>')
    return parts


def _place(confidence: float, accuracy: float) -> tuple[float, float]:
    right = LEFT + confidence * (WIDTH - LEFT - RIGHT)
    down = HEIGHT - BOTTOM - accuracy * (HEIGHT - TOP - BOTTOM)
    return round(right, 1), round(down, 1)


def _at(confidence: float, accuracy: float) -> str:
    return "{},{}".format(*_place(confidence, accuracy))


def _tick(value: float) -> str:
    """A grid line and the number beside it, on both axes."""
    (left, y), (x, bottom) = _place(0, value), _place(value, 0)
    return (
        f'<line class="grid" x1="{left}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>'
        f'<text class="axis" x="{left - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>'
        f'<text class="axis" x="{x}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
    )
