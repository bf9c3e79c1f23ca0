"""Text of unknown origin, made safe to print: what would steer a terminal or turn text around is spelled out."""

from __future__ import annotations

import re

# C0 without newline and tab, DEL and C1 steer terminals; the rest reorders or hides what stands around it
# (bidirectional marks and overrides, zero-width characters, line separators, tags), as in "Trojan Source" attacks, or
# is half a character, which cannot be printed at all.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""Spell out control characters and what reorders text; newlines and tabs stay.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return _UNSAFE.sub(lambda match: _spelled(ord(match[0])), text)


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
