"""What a token is part of."""

from __future__ import annotations

import enum


class Channel(enum.IntEnum):
    """What a token is part of: `sample.channels % HEADER`. All but CONTEXT and TEXT are written by the assistant."""

    CONTEXT = 0
    ANALYSIS = 1
    COMMENTARY = 2
    TOOL_CALL = 3
    FINAL = 4
    TEXT = 5  # plain text, without harmony's headers


HEADER = 16
"""Added to a token's channel where it is no content: from `<|start|>` to `<|message|>`, and the end token."""
