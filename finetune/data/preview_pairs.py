"""Show preference records: what their answers share once, then the answers side by side."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest

from finetune.data.harmony.render import Example
from finetune.data.preview import PAGE_STYLE, Piece, bracketed, colour_codes, pieces, span
from finetune.files import JsonObject
from finetune.log import printable

_RESET = "\x1b[0m"
_GAP = " | "
Cell = tuple[str, str]
"""A character, or several, and the terminal codes before it."""


def groups_of(examples: Sequence[Example], starts: Sequence[int]) -> list[tuple[Example, ...]]:
    """The examples of each record that begins at one of `starts`, which may leave records out."""
    groups = []
    for start in starts:
        end = start + 1
        while end < len(examples) and examples[end].where == examples[start].where:
            end += 1
        groups.append(tuple(examples[number] for number in range(start, end)))
    return groups


def group_as_text(group: Sequence[Example], *, colour: bool, width: int) -> str:
    """Format a record for the terminal: the shared prompt, then two answers per block, one beside the other.

    Args:
        group: the answers of a record, best first.
        colour: as in `preview.as_text`.
        width: columns of the terminal.
    """
    prompt, answers = _parts(group)
    lines = [_title(group), f"--- shared by all answers: {group[0].shared:,} tokens ---"]
    lines.append(_joined(_cells(prompt, colour)))
    if len(answers) == 1:
        return "\n".join([*lines, f"--- {_name(group, 0)} ---", _joined(_cells(answers[0], colour))])
    column = max(20, (width - len(_GAP)) // 2)
    for number in range(1, len(answers)):
        names = (_name(group, 0), _name(group, number))
        lines.append(_GAP.join(f"--- {name} ---".ljust(column)[:column] for name in names).rstrip())
        sides = [_wrapped(_cells(answers[each], colour), column) for each in (0, number)]
        for left, right in zip_longest(*sides, fillvalue=[]):
            space = " " * (column - sum(len(text) for text, _ in left))
            lines.append(f"{_joined(left)}{space}{_GAP}{_joined(right)}".rstrip())
    return "\n".join(lines)


def group_as_json(group: Sequence[Example]) -> JsonObject:
    """Convert a record to plain data; the texts are those of the terminal."""
    prompt, answers = _parts(group)
    return {
        "id": printable(group[0].id.removesuffix("#1")),
        "where": printable(group[0].where),
        "shared_tokens": group[0].shared,
        "prompt": [asdict(piece) for piece in prompt],
        "answers": [
            {
                "score": example.score,
                "tokens": len(example.ids) - example.shared,
                "trained_tokens": example.num_trained_tokens,
                "pieces": [asdict(piece) for piece in answer],
            }
            for example, answer in zip(group, answers, strict=True)
        ],
    }


def groups_as_html(title: str, groups: Sequence[Sequence[Example]]) -> str:
    """Format records as a page: no script, nothing loaded, and every text from the data escaped."""
    sections = []
    for group in groups:
        prompt, answers = _parts(group)
        columns = "".join(
            f"<div><h3>{html.escape(_name(group, number))}</h3><pre>{''.join(map(span, answer))}</pre></div>"
            for number, answer in enumerate(answers)
        )
        sections.append(
            f"<h2>{html.escape(_title(group))}</h2>\n<p>Shared by all answers, {group[0].shared:,} tokens:</p>\n"
            f'<pre class="shared">{"".join(map(span, prompt))}</pre>\n<div class="answers">{columns}</div>'
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{html.escape(printable(title))}</title>
<style>
{PAGE_STYLE}
body{{max-width:90em}}
h3{{font-size:0.9em}}
.shared{{background:#f4f6fa}}
.answers{{display:flex;gap:1em}}
.answers div{{flex:1;min-width:0}}
</style>
</head>
<body>
<h1>{html.escape(printable(title))}</h1>
<p>Coloured tokens are trained; grey ones are context.</p>
{chr(10).join(sections)}
</body>
</html>
"""


def _parts(group: Sequence[Example]) -> tuple[list[Piece], list[list[Piece]]]:
    """The pieces of the shared prompt, and those of each answer."""
    first, shared = group[0], group[0].shared
    return pieces(_part(first, slice(0, shared))), [pieces(_part(each, slice(shared, None))) for each in group]


def _part(example: Example, part: slice) -> Example:
    return dataclasses.replace(
        example, ids=example.ids[part], weights=example.weights[part], channels=example.channels[part]
    )


def _title(group: Sequence[Example]) -> str:
    name, where = group[0].id.removesuffix("#1"), group[0].where
    shared, own = group[0].shared, sum(len(example.ids) - example.shared for example in group)
    separate = sum(len(example.ids) for example in group)
    place = "" if name == where else f" ({where})"
    return printable(
        f"{name}{place}: {len(group)} answers, {shared + own:,} tokens with the prompt once, {separate:,} without"
    ).replace("\n", "\\n")


def _name(group: Sequence[Example], number: int) -> str:
    """An answer's name: chosen and rejected in a pair, desirable or not alone, otherwise its place and score."""
    scores, example = [each.score for each in group], group[number]
    if len(group) == 1:
        name = "desirable" if example.score > 0 else "undesirable"
    elif len(group) == 2:
        name = ("chosen", "rejected")[number] if scores[0] > scores[1] else "tie"
    else:
        name = f"answer {number + 1} of {len(group)}"
    known = {"chosen": 1.0, "rejected": 0.0, "desirable": 1.0, "undesirable": 0.0}
    score = "" if math.isnan(example.score) or known.get(name) == example.score else f", score {example.score:g}"
    return f"{name}{score}, {len(example.ids) - example.shared:,} tokens"


def _cells(found: Sequence[Piece], colour: bool) -> list[Cell]:
    if not colour:
        return [(character, "") for character in bracketed(found)]
    return [(character, colour_codes(piece)) for piece in found for character in piece.text]


def _wrapped(cells: Sequence[Cell], width: int) -> list[list[Cell]]:
    """Lines of at most `width` characters."""
    lines: list[list[Cell]] = [[]]
    for character, codes in cells:
        if character == "\n":
            lines.append([])
            continue
        if len(lines[-1]) == width:
            lines.append([])
        lines[-1].append((" " if character == "\t" else character, codes))
    return lines


def _joined(cells: Sequence[Cell]) -> str:
    """The characters, with terminal codes where they change."""

    def parts() -> Iterator[str]:
        before = ""
        for character, codes in cells:
            if codes != before:
                yield (_RESET if before else "") + codes
                before = codes
            yield character
        if before:
            yield _RESET

    return "".join(parts())
