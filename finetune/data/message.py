"""What a conversation is made of, and the one way to say that a row cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.config.suggest import suggest_word

Role = Literal["system", "developer", "user", "assistant", "tool"]
BuiltinTool = Literal["browser", "python"]

FUNCTIONS = "functions."
"""What harmony writes before the name of a function that the developer declares."""


class BadRecordError(Exception):
    """A row that cannot be used. Never reaches the person as such: reading turns it into a counted `BadRecord`.

    Args:
        kind: the group it is counted in, such as "unknown role".
        reason: what is wrong with this very row.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class ToolCall:
    """One call that the assistant makes.

    Attributes:
        recipient: as harmony addresses it: `functions.NAME`, `python`, `browser.search`, ...
        arguments: what stands in the call: JSON text, or code for `python`.
        id: what a result may name it by, or None.
    """

    recipient: str
    arguments: str
    id: str | None = None

    @property
    def is_builtin(self) -> bool:
        """Whether it calls the browser or python rather than a declared function."""
        return not self.recipient.startswith(FUNCTIONS)


@dataclass(frozen=True)
class FunctionTool:
    """A function that the developer declares.

    Attributes:
        name: without a namespace.
        description: may be empty.
        schema: JSON text of the parameters' JSON schema, or None. Text, so that it can be a key of a cache.
    """

    name: str
    description: str
    schema: str | None


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: `system` and `developer` both become harmony's developer message.
        content: plain text; text that looks like a control token stays text. Empty only beside tool calls.
        thinking: the reasoning before an assistant's answer or call (harmony's analysis channel), or None.
        channel: what an assistant's content is: its answer, or text beside its work that the user sees.
        tool_calls: the calls that follow the content.
        recipient: for a tool's result, which tool it comes from, as in `ToolCall`.
    """

    role: Role
    content: str
    thinking: str | None = None
    channel: Literal["commentary", "final"] = "final"
    tool_calls: tuple[ToolCall, ...] = ()
    recipient: str | None = None

    @property
    def is_answer(self) -> bool:
        """Whether it ends the assistant's turn with an answer."""
        return self.role == "assistant" and not self.tool_calls and self.channel == "final"


def checked_text(place: str, key: str, value: object) -> str:
    """Return `value` if it is text that can be encoded, and not blank.

    Args:
        place: where it stands, such as "message 3".
        key: its key there.

    Raises:
        BadRecordError: it is something else.
    """
    if not isinstance(value, str):
        raise BadRecordError(f"{key} is not text", f"{place} needs text as `{key}`, not {shown(value)}")
    if not value.strip():
        way_out = "; leave the key out if there is none" if key == "thinking" else ""
        raise BadRecordError(f"empty {key}", f"{place} has empty `{key}`{way_out}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRecordError("broken character", f"{place} holds half a character ({half}) in `{key}`") from None
    return value


def unknown(what: str, given: object, known: Sequence[str]) -> str:
    """Say that `given` is not one of `known`, with a suggestion.

    >>> unknown("role", "asistant", ["user", "assistant"])
    "an unknown role 'asistant'; did you mean assistant?"
    """
    if given is None:
        return f"no {what}"
    suggestion = suggest_word(str(given).lower(), list(known)) or f"known are {', '.join(known)}"
    return f"an unknown {what} {shown(given)}; {suggestion}"


def shown(value: object, limit: int = 60) -> str:
    """A value as a message shows it: containers by their kind, all else shortened to `limit` characters."""
    names = {dict: "an object", list: "an empty list" if value == [] else "a list", type(None): "nothing"}
    text = names.get(type(value)) or repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
