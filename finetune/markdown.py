"""Text of unknown origin in Markdown: as code, or as plain text without markup. Reports and model cards use it."""

from __future__ import annotations

import re

from finetune.log import printable

_MARKDOWN = re.compile(r"[\\`*\[\]<>#|~&!$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[-+](?= )|(?<=^\d)[.)]")


def code(text: str) -> str:
    """Text from the user's data as Markdown code, whatever it contains."""
    line = printable(" ".join(text.split())) or "(empty)"
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (max(map(len, re.findall("`+", line))) + 1)
    return f"{fence} {line} {fence}"


def escaped(text: str) -> str:
    r"""Text from the user's data as Markdown text: on one line, without markup, links, images or HTML.

    >>> print(escaped("<b> [a](b)"))
    \<b\> \[a\](b)
    """
    return _MARKDOWN.sub(r"\\\g<0>", printable(" ".join(text.split())))
