"""Read a list of OpenAI-style messages, one by one, each against what came before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from finetune.data.message import FUNCTIONS, BadRowError, Message, Role, ToolCall, checked_text, shown, unknown
from finetune.data.tools import NO_TOOLS, DeclaredTools, json_text, parse_tool_calls

THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")
CHANNELS = ("analysis", "commentary", "final")
_KEYS = ("role", "content", *THINKING_KEYS, "channel", "tool_calls", "name", "tool_call_id")
_KEYS_OF_ROLE = {
    "assistant": {"content", *THINKING_KEYS, "channel", "tool_calls"},
    "tool": {"content", "name", "tool_call_id"},
}


def parse_messages(raw: object, tools: DeclaredTools = NO_TOOLS) -> tuple[Message, ...]:
    """Check a record's `messages` and return them.

    Accepted is: at most one system or developer message, at the start; then users' messages and assistants' turns. A
    turn is any number of tool calls, each followed by its result, and commentary, and ends with one answer. The last
    message is an answer or a call, after at least one message from a user. A key whose value is null counts as absent,
    since Parquet gives every message every key.

    Args:
        raw: what JSON held under `messages`.
        tools: what the record declares.

    Returns:
        The messages; one with `channel: analysis` has become the `thinking` of the assistant's message after it.

    Raises:
        BadRowError: anything else. openai-harmony would render most of it without complaint, as something the model
            never sees when it is used.
    """
    if not isinstance(raw, list) or not raw:
        raise BadRowError("no messages", f"`messages` must be a list of at least one message, not {shown(raw)}")
    reader = _Reader(tools)
    for number, entry in enumerate(raw, start=1):
        reader.add(number, entry)
    return reader.finish()


class _Reader:
    """Takes messages in order and knows which calls still wait for a result and which thinking for its message."""

    def __init__(self, tools: DeclaredTools) -> None:
        self._tools = tools
        self._messages: list[Message] = []
        self._open_calls: list[ToolCall] = []
        self._thinking: str | None = None

    def add(self, number: int, raw: object) -> None:
        place = f"message {number}"
        keys = _given_keys(place, raw)
        role: Any = keys.get("role")
        if role not in get_args(Role):
            raise BadRowError("unknown role", f"{place} has {unknown('role', role, get_args(Role))}")
        _check_keys_of_role(place, role, keys)
        if role == "tool":
            self._messages.append(self._result(place, keys))
            return
        self._check_turn(place, role, number)
        if role == "assistant":
            self._add_assistant(place, keys)
        else:
            self._messages.append(Message(cast(Role, role), checked_text(place, "content", keys.get("content"))))

    def finish(self) -> tuple[Message, ...]:
        last = self._messages[-1] if self._messages else None
        if self._thinking is not None:
            raise BadRowError("no answer", "the last message is analysis: an answer or a tool call must follow it")
        if last is None or last.role != "assistant":
            role = last.role if last else "user"
            raise BadRowError("no answer", f"the last message must be from the assistant, not from the {role}")
        if not last.is_answer and not last.tool_calls:
            raise BadRowError("no answer", "the last message is commentary: an answer or a tool call must follow it")
        if not any(message.role == "user" for message in self._messages):
            raise BadRowError("no question", "no message is from the user")
        return tuple(self._messages)

    def _check_turn(self, place: str, role: str, number: int) -> None:
        previous = self._messages[-1] if self._messages else None
        if role in ("system", "developer") and number > 1:
            raise BadRowError("system message not first", f"{place} is from the {role}: only the first message may be")
        if self._open_calls:
            name = self._open_calls[0].recipient.removeprefix(FUNCTIONS)
            raise BadRowError("tool call without result", f"{place}: the call of `{name}` before it has no result")
        if role == "assistant" and previous and previous.is_answer:
            raise BadRowError("two answers in a row", f"{place} follows another one from the assistant")
        commentary = previous and previous.role == "assistant" and not previous.is_answer and not previous.tool_calls
        if role == "user" and (commentary or self._thinking is not None):
            raise BadRowError("no answer", f"{place} is from the user, but the turn before it has no answer")

    def _add_assistant(self, place: str, keys: Mapping[str, Any]) -> None:
        channel = keys.get("channel")
        calls = parse_tool_calls(place, keys.get("tool_calls"), self._tools)
        if channel is not None and channel not in CHANNELS:
            raise BadRowError("unknown channel", f"{place} has {unknown('channel', channel, CHANNELS)}")
        if calls and channel == "final":
            raise BadRowError("unknown channel", f"{place} has tool calls, and they cannot stand on the final channel")
        given = keys.get("content")
        content = "" if calls and given in (None, "") else checked_text(place, "content", given)
        thoughts = [self._thinking, _thinking(place, keys), content if channel == "analysis" and content else None]
        if sum(thought is not None for thought in thoughts) > 1:
            raise BadRowError("two thinkings", f"{place}: there is thinking and analysis before the same message")
        thinking = next((thought for thought in thoughts if thought is not None), None)
        if channel == "analysis":
            if not calls:
                self._thinking = thinking
                return
            content = ""
        spoken_in: Literal["commentary", "final"] = "commentary" if calls or channel == "commentary" else "final"
        self._messages.append(Message("assistant", content, thinking, spoken_in, calls))
        self._open_calls, self._thinking = list(calls), None

    def _result(self, place: str, keys: Mapping[str, Any]) -> Message:
        call = self._answered_call(place, keys.get("tool_call_id"), keys.get("name"))
        self._open_calls.remove(call)
        content = keys.get("content")
        if isinstance(content, Mapping):
            content = json_text(place, content)
        text = content if content == "" else checked_text(place, "content", content)  # a tool may have nothing to say
        return Message("tool", text, recipient=call.recipient)

    def _answered_call(self, place: str, identifier: object, name: object) -> ToolCall:
        if not self._open_calls:
            raise BadRowError("orphan tool result", f"{place} is a tool's result, but no call waits for one")
        short = name.removeprefix(FUNCTIONS) if isinstance(name, str) else name
        fitting = [
            call
            for call in self._open_calls
            if (identifier is None or call.id == identifier)
            and (name is None or call.recipient.removeprefix(FUNCTIONS) == short)
        ]
        given = " and ".join(
            f"{key} {shown(value)}" for key, value in (("id", identifier), ("name", name)) if value is not None
        )
        if not fitting:
            raise BadRowError("orphan tool result", f"{place}: no call with {given} waits for a result")
        if len(fitting) > 1 and identifier is None:
            raise BadRowError(
                "orphan tool result", f"{place}: {len(fitting)} calls wait for a result; say which by `tool_call_id`"
            )
        return fitting[0]


def _given_keys(place: str, raw: object) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise BadRowError("not a message", f"{place} must be an object with a role, not {shown(raw)}")
    given = {key: value for key, value in raw.items() if value is not None}
    for key in given:
        if key not in _KEYS:
            raise BadRowError("unknown message key", f"{place} has {unknown('key', key, _KEYS)}")
    return given


def _check_keys_of_role(place: str, role: str, keys: Mapping[str, Any]) -> None:
    allowed = _KEYS_OF_ROLE.get(role, {"content"}) | {"role"}
    for key in keys:
        if key not in allowed:
            kind = "thinking of another role" if key in THINKING_KEYS else "key of another role"
            raise BadRowError(kind, f"{place} is from the {role} and has `{key}`")


def _thinking(place: str, keys: Mapping[str, Any]) -> str | None:
    names = [key for key in THINKING_KEYS if key in keys]
    if len(names) > 1:
        raise BadRowError("two thinkings", f"{place} has {' and '.join(f'`{name}`' for name in names)}: keep one")
    return checked_text(place, "thinking", keys[names[0]]) if names else None
