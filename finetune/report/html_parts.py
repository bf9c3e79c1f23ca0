"""Pieces of the HTML report; every text is escaped here or was made by this package."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

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
