"""What a record holds, whichever form it came in: a checked conversation, or plain text."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from finetune.config.schema import DataForm, ReasoningEffortName
from finetune.data.forms import KEYS_OF_FORM, detect_form, to_messages
from finetune.data.message import BadRowError, Message, checked_text, shown, unknown
from finetune.data.messages import parse_messages
from finetune.data.tools import NO_TOOLS, DeclaredTools, parse_tools

_CONTROL_SPELLING = re.compile(
    r"<\|(?:start|end|message|channel|constrain|return|call|startoftext|endoftext|endofprompt|reserved_\d+)\|>"
)
_LONG_WORD = re.compile(r"[^\W\d_]{20001}")  # encoding takes time quadratic in its length: 3 s for 100,000 letters
_OVERRIDES = ("reasoning_effort", "model_identity", "conversation_date")


@dataclass(frozen=True)
class Conversation:
    """What a record holds.

    Attributes:
        messages: the messages in order; empty for plain text.
        text: plain text to be continued, or None for a conversation.
        form: the form that it was read from.
        tools: the functions and builtin tools that the assistant may call.
        reasoning_effort: overrides the recipe's if not None.
        model_identity: overrides the recipe's if not None.
        conversation_date: overrides the recipe's if not None.
        num_control_spellings: how often its texts spell a control token, such as `<|end|>`; they stay text.
    """

    messages: tuple[Message, ...]
    text: str | None = None
    form: DataForm = "messages"
    tools: DeclaredTools = NO_TOOLS
    reasoning_effort: ReasoningEffortName | None = None
    model_identity: str | None = None
    conversation_date: str | None = None
    num_control_spellings: int = 0

    @property
    def num_characters(self) -> int:
        """Characters of all texts: no token stands for more than `LONGEST_TOKEN_BYTES` bytes of them."""
        return sum(map(len, self.texts()))

    def texts(self) -> Iterator[str]:
        """Every text that the record brings into the tokens."""
        for message in self.messages:
            yield message.content
            if message.thinking:
                yield message.thinking
            for call in message.tool_calls:
                yield call.arguments
        for tool in self.tools.functions:
            yield tool.description
            yield tool.schema or ""
        yield self.model_identity or ""
        yield self.text or ""


def parse_conversation(raw: Mapping[str, Any], form: DataForm = "auto") -> Conversation:
    """Check a record and read the conversation in it.

    Args:
        raw: the whole record as JSON gave it, columns renamed; keys that belong to no form (`id`, `answer`, fields that
            `where` looks at) are passed over.
        form: how the record holds its conversation; `auto` tells it from the keys.

    Raises:
        BadRowError: it cannot be used.
    """
    if form == "auto":
        form = detect_form(raw)
    if form == "text":
        conversation = _plain_text(raw)
    else:
        tools = parse_tools(raw)
        conversation = Conversation(
            parse_messages(to_messages(raw, form), tools), form=form, tools=tools, **_parse_overrides(raw)
        )
    num_spellings = sum(len(_CONTROL_SPELLING.findall(text)) for text in conversation.texts() if "<|" in text)
    return replace(conversation, num_control_spellings=num_spellings) if num_spellings else conversation


def _plain_text(raw: Mapping[str, Any]) -> Conversation:
    for key in (*KEYS_OF_FORM["text"], "tools", "builtin_tools", *_OVERRIDES):
        if key != "text" and raw.get(key) is not None:
            raise BadRowError("key of another form", f"plain text has no place for `{key}`")
    text = checked_text("the record", "text", raw.get("text"))
    if _LONG_WORD.search(text):
        raise BadRowError("word too long", "the record has more than 20,000 letters in a row, which is no text")
    return Conversation((), text=text, form="text")


def _parse_overrides(raw: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: raw[key] for key in _OVERRIDES if raw.get(key) is not None}
    efforts = get_args(ReasoningEffortName)
    if "reasoning_effort" in given and given["reasoning_effort"] not in efforts:
        reason = f"the record has {unknown('reasoning effort', given['reasoning_effort'], efforts)}"
        raise BadRowError("unknown reasoning effort", reason)
    if "model_identity" in given:
        checked_text("the record", "model_identity", given["model_identity"])
    if "conversation_date" in given and not _is_date(given["conversation_date"]):
        reason = f"`conversation_date` must be a date such as 2025-06-28, not {shown(given['conversation_date'])}"
        raise BadRowError("bad conversation date", reason)
    return given


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False
