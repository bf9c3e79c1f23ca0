"""What a file's columns may mean where none is called as a form's keys are: a proposal, never a silent choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MEANINGS = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("question", "query", "input", "instruction", "user", "problem"),
    "completion": ("response", "reply", "output", "target", "assistant", "long_answer", "answer", "solution"),
    "text": ("content", "document", "passage", "article", "body"),
}
"""Our key -> what others call it, likeliest first."""


def propose_columns(raw: Mapping[str, Any]) -> dict[str, str]:
    """Guess which columns of a record that fits no form hold its conversation.

    Args:
        raw: the record; its keys may be in any case.

    Returns:
        A source's `columns`, our key -> its key, or nothing if no guess is good enough.
    """
    turns = raw.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        return {"messages": "conversations"}
    lists = {key: value for key, value in raw.items() if not isinstance(value, str) or value.lstrip()[:1] == "["}
    if listed := _find(lists, "messages", (list, str)):
        return {"messages": listed}
    if (prompt := _find(raw, "prompt", str)) and (completion := _find(raw, "completion", str, prompt)):
        return {ours: theirs for ours, theirs in (("prompt", prompt), ("completion", completion)) if ours != theirs}
    text = _find(raw, "text", str)
    return {"text": text} if text else {}


def _find(raw: Mapping[str, Any], ours: str, kind: type | tuple[type, ...], taken: str | None = None) -> str | None:
    lowered = {str(key).strip().lower(): key for key, value in raw.items() if isinstance(value, kind) and key != taken}
    return next((lowered[name] for name in (ours, *_MEANINGS[ours]) if name in lowered), None)


def as_yaml(columns: Mapping[str, str]) -> str:
    """`columns` as a recipe writes it, for names that need no quotes.

    >>> as_yaml({"prompt": "question", "completion": "reply"})
    'columns: {prompt: question, completion: reply}'
    """
    return f"columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in columns.items())}}}"
