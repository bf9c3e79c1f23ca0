"""Survival of a fine-tune in merges to MXFP4: text, table and SVG figure for both reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from finetune.files import JsonObject, write_text

_FILES = "survival-*.json"
_TITLES = {
    "base": "base",
    "adapter": "base + adapter",
    "bf16": "merged, bf16",
    "nearest": "nearest",
    "nearest, floor scales": "nearest, floor scales",
    "nearest, ceil scales": "nearest, ceil scales",
    "stochastic": "stochastic",
    "compensated": "compensated",
}
_WIDTH, _LEFT, _ROW, _TOP, _LARGEST = 760, 190, 34, 46, 1.6
_GAIN, _KL, _WRITTEN = "#2b6cb0", "#a0aec0", "#1a202c"


@dataclass(frozen=True)
class Survival:
    """The share of a fine-tune that one merge keeps.

    Attributes:
        target: of the export, such as `mxfp4`.
        text: the outcome in a few sentences of Markdown.
        head, rows: a table of the ways of serving; no lines if they were not measured.
        note: under the table.
        svg: the figure, or "".
        weights: of each expert tensor and overall: name, size of the update, surviving share, error.
    """

    target: str
    text: str
    head: list[str]
    rows: list[list[str]]
    note: str
    svg: str
    weights: list[tuple[str, str, str, str]]


def read_survival(run: Path) -> list[Survival]:
    """Survival in each merge of a run, from its survival-TARGET.json; half-written files are left out."""
    found = []
    for path in sorted(run.glob(_FILES)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(_survival(path.stem.removeprefix("survival-"), content))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
            continue  # half-written, or of another version: the report says less
    return found


def survival_section(merges: Sequence[Survival], run: Path) -> str:
    """The section of report.md on merges to MXFP4; empty if there was none.

    Args:
        merges: of the run.
        run: its directory; `survival-TARGET.svg` is written into it where survival was measured end to end.
    """
    parts = []
    for merge in merges:
        part = [f"`{merge.target}`: {merge.text}"]
        if merge.rows:
            figure = run / f"survival-{merge.target}.svg"
            write_text(figure, merge.svg)
            lines = [merge.head, ["---"] * len(merge.head), *merge.rows]
            part += ["\n".join(f"| {' | '.join(cells)} |" for cells in lines), merge.note]
            part.append(f"![What survives]({figure.name})")
        parts += part
    return "## Merged back to MXFP4\n\n" + "\n\n".join(parts) if parts else ""


def _survival(target: str, content: JsonObject) -> Survival:
    overall, found = content["overall"], content.get("end_to_end", {})
    text = f"{content['rounding']} rounding. The experts' update is {overall['update']:.2%} of their weights"
    if "outputs" in overall:
        seen = overall["outputs"]
        text += f"; {seen['projection']:.1%} of it survives in their outputs, beside an error of {seen['error']:.2f}"
    text += "."
    if "variants" not in found:
        text += f" Not measured end to end: {found.get('skipped', 'no figures')}."
        return Survival(target, text, [], [], "", "", _weights(content))
    verdict = found.get("verdict", {"kept": True, "reasons": [], "notes": []})
    outcome = "**Kept**." if verdict["kept"] else "**Lost**: " + "; ".join(verdict["reasons"]) + "."
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in verdict["notes"])
    head, rows = _table(found)
    note = (
        f"{found['rows']} {found['split']} examples, {found['confidence']:.0%} intervals by bootstrap over them; "
        f"gain {found['gain']:.4f} nats per trained token."
    )
    svg = survival_svg(found, content["rounding"])
    return Survival(target, f"{text} {outcome}{notes}", head, rows, note, svg, _weights(content))


def _weights(content: JsonObject) -> list[tuple[str, str, str, str]]:
    return [
        (name, f"{figures['update']:.2%}", f"{figures['survival']:.1%}", f"{figures['error']:.2f}")
        for name, figures in [*(content.get("tensors") or {}).items(), ("overall", content["overall"])]
        if isinstance(figures, Mapping) and {"update", "survival", "error"} <= figures.keys()
    ]


def _table(found: JsonObject) -> tuple[list[str], list[list[str]]]:
    variants = found["variants"]
    accuracy, old = "accuracy" in variants["base"], "old_domain_loss" in variants["base"]
    head = ["served as", "loss", "gain kept", "KL to adapter", "KL removed"]
    head += ["accuracy"] * accuracy + ["old-domain loss"] * old
    rows = []
    for name, figures in variants.items():
        low, high = figures["gain_kept_interval"] or (float("nan"), float("nan"))
        kept = "-" if figures["gain_kept"] is None else f"{figures['gain_kept']:.1%} [{low:.0%}, {high:.0%}]"
        cells = [_TITLES.get(name, name), f"{figures['loss']:.4f}", kept, f"{figures['kl']:.2e}"]
        cells.append(f"{figures['kl_removed']:.1%}")
        if accuracy:
            cells.append(f"{figures['accuracy']:.3f}")
        if old:
            cells.append(f"{figures['old_domain_loss']:.4f}")
        rows.append(cells)
    return head, rows


def survival_svg(found: JsonObject, written: str) -> str:
    """An SVG figure with two bars per way of serving: share of the gain kept, and of KL(adapter || base) removed.

    Args:
        found: the end-to-end figures of an export.
        written: the variant that the export wrote, set in bold.
    """
    rows = [(name, each) for name, each in found["variants"].items() if name not in ("base", "adapter")]
    height = _TOP + _ROW * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _legend(),
    ]
    for percent in (0, 50, 100, 150):
        x = _place(percent / 100)
        dash = "" if percent == 100 else ' stroke-dasharray="2 3"'
        parts.append(f'<line x1="{x}" y1="{_TOP - 8}" x2="{x}" y2="{height - 24}" stroke="#718096"{dash}/>')
        parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle">{percent} %</text>')
    for number, (name, each) in enumerate(rows):
        y = _TOP + number * _ROW
        weight = ' font-weight="bold"' if name == written else ""
        title = escape(_TITLES.get(name, name))
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 16}" text-anchor="end" fill="{_WRITTEN}"{weight}>{title}</text>')
        parts += [_bar(y, each["gain_kept"] or 0.0, _GAIN), _bar(y + 13, each["kl_removed"], _KL)]
    return "\n".join([*parts, "</svg>\n"])


def _legend() -> str:
    return (
        f'<rect x="{_LEFT}" y="10" width="12" height="10" fill="{_GAIN}"/>'
        f'<text x="{_LEFT + 18}" y="20">gain in held-out loss kept</text>'
        f'<rect x="{_LEFT + 210}" y="10" width="12" height="10" fill="{_KL}"/>'
        f'<text x="{_LEFT + 228}" y="20">KL(adapter || base) removed</text>'
    )


def _bar(y: int, share: float, colour: str) -> str:
    """A bar from 0 with its number; it ends at the edge of the axis where its value is beyond."""
    start, end = _place(0.0), _place(share)
    width = abs(end - start)
    label_x = max(start, end) + 5
    return (
        f'<rect x="{min(start, end):.1f}" y="{y}" width="{width:.1f}" height="11" fill="{colour}"/>'
        f'<text x="{label_x:.1f}" y="{y + 10}" font-size="10">{share:.1%}</text>'
    )


def _place(share: float) -> float:
    clipped = min(max(share, -0.3), _LARGEST)
    return round(_LEFT + (clipped + 0.3) / (_LARGEST + 0.3) * (_WIDTH - _LEFT - 60), 1)
