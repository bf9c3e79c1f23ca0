"""The tools that a record declares and the calls that its assistant makes, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from finetune.config.suggest import suggest_word
from finetune.data.message import (
    FUNCTIONS,
    BadRecordError,
    BuiltinTool,
    FunctionTool,
    Message,
    Role,
    ToolCall,
    checked_text,
    shown,
    unknown,
)

BUILTIN_RECIPIENTS: dict[BuiltinTool, tuple[str, ...]] = {
    "browser": ("browser.search", "browser.open", "browser.find"),
    "python": ("python",),
}
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_CALL_KEYS = ("id", "type", "function", "name", "arguments", "index")


@dataclass(frozen=True)
class DeclaredTools:
    """What a record lets the assistant call.

    Attributes:
        functions: its `tools`, in its order.
        builtin: its `builtin_tools`, browser first.
    """

    functions: tuple[FunctionTool, ...] = ()
    builtin: tuple[BuiltinTool, ...] = ()

    @property
    def recipients(self) -> tuple[str, ...]:
        """Everything that may be called, as harmony addresses it."""
        functions = tuple(FUNCTIONS + tool.name for tool in self.functions)
        return functions + tuple(name for tool in self.builtin for name in BUILTIN_RECIPIENTS[tool])


NO_TOOLS = DeclaredTools()


def parse_tools(raw: Mapping[str, Any]) -> DeclaredTools:
    """Read a record's `tools` or `functions` (OpenAI's JSON form, or JSON text of it) and `builtin_tools`.

    Raises:
        BadRecordError: either is malformed, a name cannot be written in harmony, or one is declared twice.
    """
    keys = [key for key in ("tools", "functions") if raw.get(key) is not None]
    if len(keys) == 2:
        raise BadRecordError("bad tools", "the record has `tools` and `functions`: keep one")
    tools = _list(keys[0], raw[keys[0]]) if keys else []
    functions = tuple(_parse_function(number, tool) for number, tool in enumerate(tools, start=1))
    names = [tool.name for tool in functions]
    for name in names:
        if names.count(name) > 1:
            raise BadRecordError("bad tools", f"`tools` declares `{name}` twice")
    return DeclaredTools(functions, _parse_builtin(raw.get("builtin_tools")))


def parse_tool_calls(place: str, raw: object, tools: DeclaredTools) -> tuple[ToolCall, ...]:
    """Read a message's `tool_calls`: OpenAI's form, or the same without the `function` level.

    Arguments are an object or JSON text of one; either way they are written as `json.dumps` writes them, so that text
    is not encoded twice. The builtin python takes its code as text, or as `{"code": ...}`.

    Args:
        place: which message, such as "message 3".
        raw: what JSON held under `tool_calls`; None or an empty list are no calls.
        tools: what may be called.

    Raises:
        BadRecordError: a call is malformed, its arguments are not JSON, or nothing of its name is declared.
    """
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise BadRecordError("bad tool call", f"{place} needs a list as `tool_calls`, not {shown(raw)}")
    return tuple(_parse_call(place, call, tools) for call in raw)


def parse_json(what: str, text: str) -> Any:
    """Decode JSON text found inside a record.

    Raises:
        BadRecordError: it is not JSON, holds NaN or Infinity, or a key twice.
    """

    def refuse(constant: str) -> None:
        raise BadRecordError("bad JSON inside", f"{what} holds {constant}, which is not JSON")

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise BadRecordError("bad JSON inside", f"{what} holds a key twice in one object")
        return result

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=without_repeats)
    except (json.JSONDecodeError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise BadRecordError("bad JSON inside", f"{what} is not JSON ({why}): {shown(text)}") from None


def json_text(what: str, value: object) -> str:
    """Encode a value as the JSON text that both conventions write: no escapes that are not needed.

    Raises:
        BadRecordError: it holds half a character or a number that is none, which cannot be encoded.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise BadRecordError("broken character", f"{what} holds half a character") from None
    except (ValueError, TypeError) as error:
        raise BadRecordError("bad JSON inside", f"{what} cannot be written as JSON: {error}") from None
    return text


def _list(key: str, value: object) -> list[Any]:
    """A list, or JSON text of one, which is how tables without nested types hold it."""
    if isinstance(value, str):
        value = parse_json(f"`{key}`", value)
    if not isinstance(value, list):
        raise BadRecordError("bad tools", f"`{key}` must be a list of tools, not {shown(value)}")
    return value


def _parse_function(number: int, raw: object) -> FunctionTool:
    place = f"tool {number}"
    if not isinstance(raw, Mapping):
        raise BadRecordError("bad tools", f"{place} must be an object, not {shown(raw)}")
    if raw.get("type", "function") != "function":
        raise BadRecordError("bad tools", f"{place} is of type {shown(raw['type'])}, not function")
    function = raw.get("function", raw)
    if not isinstance(function, Mapping):
        raise BadRecordError("bad tools", f"{place} needs an object as `function`, not {shown(function)}")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadRecordError("bad tools", f"{place} needs a name of letters, digits, _ and -, not {shown(name)}")
    if description is not None and not isinstance(description, str):
        raise BadRecordError("bad tools", f"{place} needs text as `description`, not {shown(description)}")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise BadRecordError("bad tools", f"{place} needs a JSON schema as `parameters`, not {shown(parameters)}")
    json_text(place, description)
    return FunctionTool(name, description or "", None if parameters is None else json_text(place, parameters))


def _parse_builtin(raw: object) -> tuple[BuiltinTool, ...]:
    if raw is None:
        return ()
    raw = _list("builtin_tools", raw)
    for name in raw:
        if name not in get_args(BuiltinTool):
            raise BadRecordError("bad tools", f"`builtin_tools` has {unknown('tool', name, get_args(BuiltinTool))}")
    return tuple(cast(BuiltinTool, name) for name in get_args(BuiltinTool) if name in raw)


def _parse_call(place: str, raw: object, tools: DeclaredTools) -> ToolCall:
    if not isinstance(raw, Mapping):
        raise BadRecordError("bad tool call", f"{place}: a tool call must be an object, not {shown(raw)}")
    for key, value in raw.items():
        if key not in _CALL_KEYS and value is not None:
            raise BadRecordError("bad tool call", f"{place}: a tool call has {unknown('key', key, _CALL_KEYS)}")
    call = raw.get("function") or raw
    if not isinstance(call, Mapping):
        raise BadRecordError("bad tool call", f"{place} needs an object as `function`, not {shown(call)}")
    identifier = raw.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise BadRecordError("bad tool call", f"{place}: a tool call's `id` must be text, not {shown(identifier)}")
    recipient = _recipient(place, call.get("name"), tools)
    return ToolCall(recipient, _arguments(place, recipient, call.get("arguments")), identifier or None)


def _recipient(place: str, name: object, tools: DeclaredTools) -> str:
    """The declared tool that `name` means, with or without the namespace `functions.`."""
    known = tools.recipients
    if not isinstance(name, str):
        raise BadRecordError("bad tool call", f"{place}: a tool call needs a name, not {shown(name)}")
    for candidate in (FUNCTIONS + name, name):
        if candidate in known:
            return candidate
    if not known:
        raise BadRecordError("undeclared tool", f"{place} calls `{name}`, but the record declares no `tools`")
    short = [recipient.removeprefix(FUNCTIONS) for recipient in known]
    hint = suggest_word(name, short) or f"declared are {', '.join(short)}"
    raise BadRecordError("undeclared tool", f"{place} calls `{name}`, which is not declared; {hint}")


def _arguments(place: str, recipient: str, raw: object) -> str:
    what = f"{place}: `arguments` of `{recipient.removeprefix(FUNCTIONS)}`"
    if recipient == "python":
        code = raw.get("code") if isinstance(raw, Mapping) and set(raw) == {"code"} else raw
        if not isinstance(code, str) or not code.strip():
            raise BadRecordError("bad arguments", f"{what} must be code as text, not {shown(code)}")
        json_text(what, code)
        return code
    try:
        value = parse_json(what, raw) if isinstance(raw, str) else raw
    except BadRecordError as error:
        raise BadRecordError("bad arguments", error.reason) from None
    if not isinstance(value, Mapping):
        raise BadRecordError("bad arguments", f"{what} must be an object, not {shown(value)}")
    return json_text(what, value)


# Read a list of OpenAI-style messages, one by one, each against what came before it.

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
        BadRecordError: anything else. openai-harmony would render most of it without complaint, as something the model
            never sees when it is used.
    """
    if not isinstance(raw, list) or not raw:
        raise BadRecordError("no messages", f"`messages` must be a list of at least one message, not {shown(raw)}")
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
            raise BadRecordError("unknown role", f"{place} has {unknown('role', role, get_args(Role))}")
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
            raise BadRecordError("no answer", "the last message is analysis: an answer or a tool call must follow it")
        if last is None or last.role != "assistant":
            role = last.role if last else "user"
            raise BadRecordError("no answer", f"the last message must be from the assistant, not from the {role}")
        if not last.is_answer and not last.tool_calls:
            raise BadRecordError("no answer", "the last message is commentary: an answer or a tool call must follow it")
        if not any(message.role == "user" for message in self._messages):
            raise BadRecordError("no question", "no message is from the user")
        return tuple(self._messages)

    def _check_turn(self, place: str, role: str, number: int) -> None:
        previous = self._messages[-1] if self._messages else None
        if role in ("system", "developer") and number > 1:
            raise BadRecordError(
                "system message not first", f"{place} is from the {role}: only the first message may be"
            )
        if self._open_calls:
            name = self._open_calls[0].recipient.removeprefix(FUNCTIONS)
            raise BadRecordError("tool call without result", f"{place}: the call of `{name}` before it has no result")
        if role == "assistant" and previous and previous.is_answer:
            raise BadRecordError("two answers in a row", f"{place} follows another one from the assistant")
        commentary = previous and previous.role == "assistant" and not previous.is_answer and not previous.tool_calls
        if role == "user" and (commentary or self._thinking is not None):
            raise BadRecordError("no answer", f"{place} is from the user, but the turn before it has no answer")

    def _add_assistant(self, place: str, keys: Mapping[str, Any]) -> None:
        channel = keys.get("channel")
        calls = parse_tool_calls(place, keys.get("tool_calls"), self._tools)
        if channel is not None and channel not in CHANNELS:
            raise BadRecordError("unknown channel", f"{place} has {unknown('channel', channel, CHANNELS)}")
        if calls and channel == "final":
            raise BadRecordError(
                "unknown channel", f"{place} has tool calls, and they cannot stand on the final channel"
            )
        given = keys.get("content")
        content = "" if calls and given in (None, "") else checked_text(place, "content", given)
        thoughts = [self._thinking, _thinking(place, keys), content if channel == "analysis" and content else None]
        if sum(thought is not None for thought in thoughts) > 1:
            raise BadRecordError("two thinkings", f"{place}: there is thinking and analysis before the same message")
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
            raise BadRecordError("orphan tool result", f"{place} is a tool's result, but no call waits for one")
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
            raise BadRecordError("orphan tool result", f"{place}: no call with {given} waits for a result")
        if len(fitting) > 1 and identifier is None:
            raise BadRecordError(
                "orphan tool result", f"{place}: {len(fitting)} calls wait for a result; say which by `tool_call_id`"
            )
        return fitting[0]


def _given_keys(place: str, raw: object) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise BadRecordError("not a message", f"{place} must be an object with a role, not {shown(raw)}")
    given = {key: value for key, value in raw.items() if value is not None}
    for key in given:
        if key not in _KEYS:
            raise BadRecordError("unknown message key", f"{place} has {unknown('key', key, _KEYS)}")
    return given


def _check_keys_of_role(place: str, role: str, keys: Mapping[str, Any]) -> None:
    allowed = _KEYS_OF_ROLE.get(role, {"content"}) | {"role"}
    for key in keys:
        if key not in allowed:
            kind = "thinking of another role" if key in THINKING_KEYS else "key of another role"
            raise BadRecordError(kind, f"{place} is from the {role} and has `{key}`")


def _thinking(place: str, keys: Mapping[str, Any]) -> str | None:
    names = [key for key in THINKING_KEYS if key in keys]
    if len(names) > 1:
        raise BadRecordError("two thinkings", f"{place} has {' and '.join(f'`{name}`' for name in names)}: keep one")
    return checked_text(place, "thinking", keys[names[0]]) if names else None
