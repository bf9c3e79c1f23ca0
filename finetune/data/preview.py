r"""Show examples as text, HTML or JSON: trained tokens by channel, context, and control tokens.

Everything from the data is made safe first (`printable`). A control token is shown as it is spelt; text that only
spells one is shown with a backslash in it, `<\|end|>`, so that the two cannot be confused.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from finetune.data.harmony.encode import HEADER, Channel
from finetune.data.harmony.render import Example
from finetune.data.harmony.tokenizer import FIRST_CONTROL_ID, harmony_encoding
from finetune.files import JsonObject
from finetune.log import printable

_COLOURS = {
    Channel.ANALYSIS: ("33", "#8a5a00"),
    Channel.COMMENTARY: ("35", "#8b1a8b"),
    Channel.TOOL_CALL: ("36", "#00707a"),
    Channel.FINAL: ("32", "#176b1d"),
    Channel.TEXT: ("34", "#1a4fa0"),
}
"""For the terminal and for HTML. Trained tokens have their channel's; context has none."""
PAGE_STYLE = """body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
h2{font-size:1em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ccc;padding:1em}
.context{color:#767676;font-weight:400}
.control{background:#eee}
""" + "".join(f".{channel.name.lower()}{{color:{colour};font-weight:600}}" for channel, (_, colour) in _COLOURS.items())
_DIM, _INVERSE, _RESET = "2", "7", "\x1b[0m"


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one channel and weight.

    Attributes:
        text: the decoded tokens, safe to print.
        channel: `context`, `analysis`, `commentary`, `tool_call`, `final` or `text`.
        weight: their loss weight; 0 means context.
        is_control: whether they are control tokens.
        num_tokens: number of tokens.
    """

    text: str
    channel: str
    weight: float
    is_control: bool
    num_tokens: int


def pieces(example: Example) -> list[Piece]:
    """Cut an example into runs of tokens of one channel and weight; control tokens are runs of their own."""
    channels = (example.channels % HEADER).tolist() or [int(Channel.CONTEXT)] * len(example.ids)
    tokens = zip(example.ids.tolist(), channels, example.weights.tolist(), strict=True)
    found = []
    for (channel, weight, is_control), run in groupby(
        tokens, lambda token: (token[1], token[2], token[0] >= FIRST_CONTROL_ID)
    ):
        ids = [token for token, _, _ in run]
        text = harmony_encoding().decode(ids)
        text = printable(text if is_control else text.replace("<|", "<\\|"))
        found.append(Piece(text, Channel(channel).name.lower(), weight, is_control, len(ids)))
    return found


def spread(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `count` items, evenly spread from the first on; all of them if there are no more."""
    return [number * count // wanted for number in range(wanted)] if wanted < count else list(range(count))


def as_text(example: Example, *, colour: bool) -> str:
    """Format an example for the terminal.

    Args:
        example: as rendered.
        colour: trained tokens in their channel's colour and context dim; otherwise trained tokens are in brackets
            with the channel's name, and with the weight if it is not 1.
    """
    body = "".join(_coloured(piece) for piece in pieces(example)) if colour else bracketed(pieces(example))
    return f"{_title(example)}\n{body}"


def as_json(example: Example) -> JsonObject:
    """Convert an example to plain data; the texts are those of the terminal."""
    return {
        "id": printable(example.id),
        "where": printable(example.where),
        "tokens": len(example.ids),
        "trained_tokens": example.num_trained_tokens,
        "pieces": [asdict(piece) for piece in pieces(example)],
    }


def as_html(title: str, examples: Sequence[Example]) -> str:
    """Format examples as a page: no script, nothing loaded, and every text from the data escaped."""
    legend = " ".join(f'<span class="{channel.name.lower()}">{channel.name.lower()}</span>' for channel in _COLOURS)
    sections = "\n".join(
        f"<h2>{html.escape(_title(example))}</h2>\n<pre>{''.join(map(span, pieces(example)))}</pre>"
        for example in examples
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{html.escape(printable(title))}</title>
<style>
{PAGE_STYLE}
</style>
</head>
<body>
<h1>{html.escape(printable(title))}</h1>
<p>Trained: {legend}. <span class="context">Context: not trained.</span>
<span class="control">Control tokens</span> have a background; text that only spells one has a backslash in it.</p>
{sections}
</body>
</html>
"""


def _title(example: Example) -> str:
    share = example.num_trained_tokens / max(1, len(example.ids))
    place = "" if example.id == example.where else f" ({example.where})"  # a record without an id is named by its place
    return printable(
        f"{example.id}{place}: {len(example.ids):,} tokens, {example.num_trained_tokens:,} trained ({share:.1%})"
    ).replace("\n", "\\n")


def _coloured(piece: Piece) -> str:
    return f"{colour_codes(piece)}{piece.text}{_RESET}"


def colour_codes(piece: Piece) -> str:
    """The terminal codes of a piece: its channel's colour if it is trained, and inverse for control tokens."""
    codes = [_COLOURS[Channel[piece.channel.upper()]][0] if piece.weight else _DIM]
    if piece.is_control:
        codes.append(_INVERSE)
    return f"\x1b[{';'.join(codes)}m"


def bracketed(all_pieces: Sequence[Piece]) -> str:
    """Text with trained tokens in brackets, each with its channel and a weight other than 1."""

    def parts() -> Iterator[str]:
        for (channel, weight), run in groupby(all_pieces, lambda piece: (piece.weight and piece.channel, piece.weight)):
            text = "".join(piece.text for piece in run)
            named = f"{channel} x{weight:g}" if weight != 1 else channel
            yield f"[{named}: {text}]" if weight else text

    return "".join(parts())


def span(piece: Piece) -> str:
    """A piece as HTML."""
    names = [piece.channel if piece.weight else "context", *(["control"] if piece.is_control else [])]
    weight = f' title="loss weight {piece.weight:g}"' if piece.weight not in (0, 1) else ""
    return f'<span class="{" ".join(names)}"{weight}>{html.escape(piece.text)}</span>'
