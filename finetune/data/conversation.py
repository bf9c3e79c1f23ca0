"""What a record's `messages` may hold, checked message by message; each refusal says what is wrong in a few words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from finetune.config.keys import suggest_word
from finetune.config.schema import DataForm, ReasoningEffortName

Role = Literal["system", "developer", "user", "assistant"]

_MESSAGE_KEYS = ("role", "content", "thinking")
_LATER = {"tool": "tool messages", "function": "tool messages", "tool_calls": "tool calls", "tools": "tools"}


class BadRowError(Exception):
    """A row that cannot be used. Never reaches the person as such: reading turns it into a counted `BadRow`.

    Args:
        kind: the group it is counted in, such as "unknown role".
        reason: what is wrong with this very row.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: `system` and `developer` both become harmony's developer message.
        content: plain text; text that looks like a control token stays text.
        thinking: the reasoning before an assistant's answer (harmony's analysis channel), or None.
    """

    role: Role
    content: str
    thinking: str | None = None


@dataclass(frozen=True)
class Conversation:
    """What a record holds, whichever form it came in.

    Attributes:
        messages: the messages in order; empty for plain text.
        text: plain text to be continued, or None for a conversation.
        form: the form that it was read from.
        reasoning_effort: overrides the recipe's if not None.
        model_identity: overrides the recipe's if not None.
        conversation_date: overrides the recipe's if not None.
        num_control_spellings: how often its texts spell a control token, such as `<|end|>`; they stay text.
    """

    messages: tuple[Message, ...]
    text: str | None = None
    form: DataForm = "messages"
    reasoning_effort: ReasoningEffortName | None = None
    model_identity: str | None = None
    conversation_date: str | None = None
    num_control_spellings: int = 0

    @property
    def num_characters(self) -> int:
        """Characters of all texts: a bound from below on the work that encoding them is."""
        return sum(len(message.content) + len(message.thinking or "") for message in self.messages)


def parse_conversation(raw: Mapping[str, Any], form: DataForm = "auto") -> Conversation:
    """Check a record and read the conversation in it.

    Args:
        raw: the whole record as JSON gave it, columns renamed; keys that belong to no form (`id`, `answer`, fields that
            `where` looks at) are passed over.
        form: how the record holds its conversation; `auto` tells it from the keys.

    Raises:
        BadRowError: it cannot be used.
    """
    if "messages" not in raw:
        raise BadRowError("no messages", f"the record has no `messages`, only {', '.join(raw) or 'nothing'}")
    return Conversation(parse_messages(raw["messages"]))


def parse_messages(raw: object) -> tuple[Message, ...]:
    """Check a record's `messages` and return them.

    Accepted is: at most one system or developer message, at the start; then user and assistant messages of which no two
    assistant messages follow each other; the last from the assistant, after at least one from the user.

    Args:
        raw: what JSON held under `messages`.

    Raises:
        BadRowError: anything else. openai-harmony would render most of it without complaint, as something the model
            never sees when it is used.
    """
    if not isinstance(raw, list) or not raw:
        raise BadRowError("no messages", f"`messages` must be a list of at least one message, not {_shown(raw)}")
    messages = tuple(_parse_message(number, entry) for number, entry in enumerate(raw, start=1))
    _check_order(messages)
    return messages


def _parse_message(number: int, raw: object) -> Message:
    if not isinstance(raw, Mapping):
        raise BadRowError("not a message", f"message {number} must be an object with a role, not {_shown(raw)}")
    for key in raw:
        if key not in _MESSAGE_KEYS:
            raise BadRowError("unknown message key", f"message {number} has {_unknown('key', key, _MESSAGE_KEYS)}")
    role = raw.get("role")
    if role not in get_args(Role):
        raise BadRowError("unknown role", f"message {number} has {_unknown('role', role, get_args(Role))}")
    content = _text(number, "content", raw.get("content"))
    thinking = _text(number, "thinking", raw["thinking"]) if "thinking" in raw else None
    if thinking is not None and role != "assistant":
        raise BadRowError("thinking of another role", f"message {number} is from the {role} and has `thinking`")
    return Message(cast(Role, role), content, thinking)


def _text(number: int, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{key} is not text", f"message {number} needs text as `{key}`, not {_shown(value)}")
    if not value.strip():
        way_out = "; leave the key out if there is none" if key == "thinking" else ""
        raise BadRowError(f"empty {key}", f"message {number} has empty `{key}`{way_out}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRowError("broken character", f"message {number} holds half a character ({half}) in `{key}`") from None
    return value


def _check_order(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    for number, role in enumerate(roles, start=1):
        if role in ("system", "developer") and number > 1:
            raise BadRowError(
                "system message not first", f"message {number} is from the {role}: only the first message may be"
            )
        if number > 1 and role == "assistant" and roles[number - 2] == "assistant":
            raise BadRowError("two answers in a row", f"message {number} follows another one from the assistant")
    if roles[-1] != "assistant":
        raise BadRowError("no answer", f"the last message must be from the assistant, not from the {roles[-1]}")
    if "user" not in roles:
        raise BadRowError("no question", "no message is from the user")


def _unknown(what: str, given: object, known: Sequence[str]) -> str:
    if given in _LATER:
        return f"the {what} `{given}`: {_LATER[str(given)]} arrive with a later version"
    if given is None:
        return f"no {what}"
    suggestion = suggest_word(str(given).lower(), list(known)) or f"known are {', '.join(known)}"
    return f"an unknown {what} {_shown(given)}; {suggestion}"


def _shown(value: object) -> str:
    names = {dict: "an object", list: "an empty list" if value == [] else "a list", type(None): "nothing"}
    return names.get(type(value)) or _shortened(repr(value))


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
