"""Small pieces of text that reports share."""

from __future__ import annotations

import re


def code(text: str) -> str:
    """Text of a person's own as code, whatever stands in it."""
    line = " ".join(text.split())
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (max(map(len, re.findall("`+", line))) + 1)
    return f"{fence} {line} {fence}"
