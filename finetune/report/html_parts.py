"""Pieces of the HTML report; every text is escaped here or was made by this package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_NUMBER_STARTS = "0123456789+-"


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
    """A table of texts; numbers stand on the right. "" without rows."""
    body = "".join("<tr>" + "".join(_cell(str(value)) for value in row) + "</tr>" for row in rows)
    if not body:
        return ""
    head = "<tr>" + "".join(f"<th>{escape(title)}</th>" for title in titles) + "</tr>" if titles else ""
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def _cell(text: str) -> str:
    is_number = text[:1] in _NUMBER_STARTS and text.replace(",", "").replace(".", "").lstrip("+-").isdigit()
    return f'<td class="number">{escape(text)}</td>' if is_number else f"<td>{escape(text)}</td>"


def bars(values: Mapping[str, float]) -> str:
    """A bar for each named value, all on one scale."""
    largest = max(values.values(), default=0.0) or 1.0
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td class='number'>{value:.3g}</td>"
        f'<td style="width:45%"><span class="bar" style="width:{100 * value / largest:.1f}%"></span></td></tr>'
        for name, value in values.items()
    )
    return f'<details><summary>{len(values)} weights</summary><div class="scroll"><table>{rows}</table></div></details>'


def survival_table(survival: Mapping[str, Any]) -> str:
    """What of the update is in a merged MXFP4 export, tensor by tensor."""
    tensors = survival.get("tensors") or {}
    rows = [
        (name, f"{figures['update']:.2%}", f"{figures['survival']:.1%}", f"{figures['error']:.2f}")
        for name, figures in [*tensors.items(), ("overall", survival.get("overall"))]
        if isinstance(figures, Mapping) and {"update", "survival", "error"} <= figures.keys()
    ]
    return rows_table(("expert tensor", "update, of the weights", "survives", "error, of the update"), rows)
