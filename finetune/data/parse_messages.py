"""Parse OpenAI-style messages, tool declarations and tool calls; each message is checked against those before it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from finetune.config.suggest import suggest_word
from finetune.data.checks import BadRecordError, checked_text, json_text, parse_json, shown, unknown
from finetune.data.conversation import (
    FUNCTIONS,
    NO_TOOLS,
    BuiltinTool,
    DeclaredTools,
    FunctionTool,
    Message,
    Role,
    ToolCall,
)
from finetune.data.foreign_messages import THINKING_KEYS, plain_messages
from finetune.data.tool_schemas import is_padded, parameters_of, read_parameters, without_padding_nulls
from finetune.files import JsonObject

CHANNELS = ("analysis", "commentary", "final")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_CALL_KEYS = ("id", "type", "function", "name", "arguments", "index")
_KEYS = ("role", "content", *THINKING_KEYS, "channel", "tool_calls", "name", "tool_call_id", "weight")
_KEYS_OF_ROLE = {
    "assistant": {"content", "thinking", "channel", "tool_calls", "weight"},
    "tool": {"content", "name", "tool_call_id"},
}
_OTHER_ROLE_NAMES = {
    **dict.fromkeys(("human", "customer", "player", "prompter", "question"), "user"),
    **dict.fromkeys(("ai", "gpt", "bot", "model", "chatgpt", "chatbot", "agent", "answer"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "ipython"), "tool"),
}


def parse_messages(raw: object, tools: DeclaredTools = NO_TOOLS, *, padded: bool = False) -> tuple[Message, ...]:
    """Check a record's `messages` and return them.

    Accepted: at most one system or developer message, at the start; then user messages and assistant turns. A turn is
    any number of tool calls, each followed by its result, and commentary, and ends with one answer. The last message is
    an answer or a call, after at least one message from a user. Forms of other libraries are read too
    (`finetune.data.foreign_messages`).

    Args:
        raw: the JSON value under `messages`.
        tools: the tools that the record declares.
        padded: the record has nulls that Arrow put there (`is_padded`); those in arguments are left out.

    Returns:
        The messages; one with `channel: analysis` becomes the `thinking` of the assistant message after it.

    Raises:
        BadRecordError: anything else. openai-harmony would render most of it without an error, as something that the
            model never sees in use.
    """
    if not isinstance(raw, list) or not raw:
        raise BadRecordError("no messages", f"`messages` must be a list of at least one message, not {shown(raw)}")
    parser = _MessageParser(tools, padded)
    for number, entry in enumerate(plain_messages(raw), start=1):
        parser.add(number, entry)
    return parser.finish()


class _MessageParser:
    """Takes messages in order; tracks calls without a result and thinking without its message."""

    def __init__(self, tools: DeclaredTools, padded: bool) -> None:
        self._tools, self._padded = tools, padded
        self._messages: list[Message] = []
        self._open_calls: list[ToolCall] = []
        self._thinking: str | None = None

    def add(self, number: int, raw: object) -> None:
        place = f"message {number}"
        keys = _given_keys(place, raw)
        role: Any = keys.get("role")
        if role not in get_args(Role):
            raise BadRecordError(
                "unknown role", f"{place} has {unknown('role', role, get_args(Role), _OTHER_ROLE_NAMES)}"
            )
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
            reason = f"{place} is from the {role}: only the first message may be"
            raise BadRecordError("system message not first", reason)
        if self._open_calls:
            name = self._open_calls[0].recipient.removeprefix(FUNCTIONS)
            raise BadRecordError("tool call without result", f"{place}: the call of `{name}` before it has no result")
        if role == "assistant" and previous and previous.is_answer:
            raise BadRecordError("two answers in a row", f"{place} follows another one from the assistant")
        commentary = previous and previous.role == "assistant" and not previous.is_answer and not previous.tool_calls
        if role == "user" and (commentary or self._thinking is not None):
            raise BadRecordError("no answer", f"{place} is from the user, but the turn before it has no answer")

    def _add_assistant(self, place: str, keys: JsonObject) -> None:
        channel = keys.get("channel")
        calls = parse_tool_calls(place, keys.get("tool_calls"), self._tools, padded=self._padded)
        if channel is not None and channel not in CHANNELS:
            raise BadRecordError("unknown channel", f"{place} has {unknown('channel', channel, CHANNELS)}")
        if calls and channel == "final":
            raise BadRecordError("unknown channel", f"{place} has tool calls: the final channel has none")
        given = keys.get("content")
        content = "" if calls and given in (None, "") else checked_text(place, "content", given)
        thinks = checked_text(place, "thinking", keys["thinking"]) if "thinking" in keys else None
        thoughts = [self._thinking, thinks, content if channel == "analysis" and content else None]
        if sum(thought is not None for thought in thoughts) > 1:
            raise BadRecordError("two thinkings", f"{place}: there is thinking and analysis before the same message")
        thinking = next((thought for thought in thoughts if thought is not None), None)
        if channel == "analysis":
            if not calls:
                if "weight" in keys:
                    raise BadRecordError("bad weight", f"{place} is analysis: give `weight` to the message after it")
                self._thinking = thinking
                return
            content = ""
        content_channel: Literal["commentary", "final"] = "commentary" if calls or channel == "commentary" else "final"
        message = Message("assistant", content, thinking, content_channel, calls, weight=keys.get("weight"))
        self._messages.append(message)
        self._open_calls, self._thinking = list(calls), None

    def _result(self, place: str, keys: JsonObject) -> Message:
        call = self._answered_call(place, keys.get("tool_call_id"), keys.get("name"))
        self._open_calls.remove(call)
        content = keys.get("content")
        if isinstance(content, Mapping):
            content = json_text(place, content)
        text = content if content == "" else checked_text(place, "content", content)  # a tool may return nothing
        return Message("tool", text, recipient=call.recipient)

    def _answered_call(self, place: str, identifier: object, name: object) -> ToolCall:
        if not self._open_calls:
            previous = self._messages[-1].content if self._messages else ""
            in_text = "<tool_call>" in previous or "<function_call>" in previous
            advice = (
                "; the call stands as text in the answer before: set the source's `form: hermes`" if in_text else ""
            )
            raise BadRecordError("orphan tool result", f"{place} is a tool's result, but no call waits for one{advice}")
        short = name.removeprefix(FUNCTIONS) if isinstance(name, str) else name
        fitting = [
            call
            for call in self._open_calls
            if (identifier is None or call.id == identifier)
            and (name is None or call.recipient.removeprefix(FUNCTIONS) == short)
        ]
        if not fitting:
            keys = (("id", identifier), ("name", name))
            given = " and ".join(f"{key} {shown(value)}" for key, value in keys if value is not None)
            raise BadRecordError("orphan tool result", f"{place}: no call with {given} waits for a result")
        if len(fitting) > 1 and identifier is None:
            reason = f"{place}: {len(fitting)} calls wait for a result; name one with `tool_call_id`"
            raise BadRecordError("orphan tool result", reason)
        return fitting[0]


def _given_keys(place: str, raw: object) -> JsonObject:
    if not isinstance(raw, Mapping):
        raise BadRecordError("not a message", f"{place} must be an object with a role, not {shown(raw)}")
    given = {key: value for key, value in raw.items() if value is not None}
    for key in given:
        if key not in _KEYS:
            raise BadRecordError("unknown message key", f"{place} has {unknown('key', key, _KEYS)}")
    return given


def _check_keys_of_role(place: str, role: str, keys: JsonObject) -> None:
    allowed = _KEYS_OF_ROLE.get(role, {"content"}) | {"role"}
    for key in keys:
        if key not in allowed:
            kind = "thinking of another role" if key in THINKING_KEYS else "key of another role"
            raise BadRecordError(kind, f"{place} is from the {role} and has `{key}`")


def parse_tools(raw: JsonObject) -> DeclaredTools:
    """Read a record's `tools` or `functions` (OpenAI's JSON form, or JSON text of it) and `builtin_tools`.

    Raises:
        BadRecordError: either is malformed, a name cannot be written in harmony, or one is declared twice.
    """
    keys = [key for key in ("tools", "functions") if raw.get(key) is not None]
    if len(keys) == 2:
        raise BadRecordError("bad tools", "the record has `tools` and `functions`: keep one")
    tools = _tool_list(keys[0], raw[keys[0]]) if keys else []
    padded = is_padded(raw)
    functions = tuple(_parse_function(number, tool, padded) for number, tool in enumerate(tools, start=1))
    names = [tool.name for tool in functions]
    for name in names:
        if names.count(name) > 1:
            raise BadRecordError("bad tools", f"`tools` declares `{name}` twice")
    return DeclaredTools(functions, _parse_builtin(raw.get("builtin_tools")))


def _tool_list(key: str, value: object) -> list[Any]:
    """A list, or JSON text of one: tables without nested types store text."""
    if isinstance(value, str):
        value = parse_json(value, f"`{key}`", inside=True)
    if not isinstance(value, list):
        raise BadRecordError("bad tools", f"`{key}` must be a list of tools, not {shown(value)}")
    return value


def _parse_function(number: int, raw: object, padded: bool) -> FunctionTool:
    place = f"tool {number}"
    if not isinstance(raw, Mapping):
        raise BadRecordError("bad tools", f"{place} must be an object, not {shown(raw)}")
    raw = {key: value for key, value in raw.items() if value is not None}
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
    parameters = read_parameters(place, parameters_of(place, raw), is_padded=padded)
    json_text(place, description)
    return FunctionTool(name, description or "", None if parameters is None else json_text(place, parameters))


def _parse_builtin(raw: object) -> tuple[BuiltinTool, ...]:
    if raw is None:
        return ()
    raw = _tool_list("builtin_tools", raw)
    for name in raw:
        if name not in get_args(BuiltinTool):
            raise BadRecordError("bad tools", f"`builtin_tools` has {unknown('tool', name, get_args(BuiltinTool))}")
    return tuple(cast(BuiltinTool, name) for name in get_args(BuiltinTool) if name in raw)


def parse_tool_calls(place: str, raw: object, tools: DeclaredTools, *, padded: bool = False) -> tuple[ToolCall, ...]:
    """Read a message's `tool_calls`: OpenAI's form, or the same without the `function` level.

    Arguments are an object or JSON text of one; either way they are written as `json.dumps` writes them, so that text
    is not encoded twice. The builtin python takes its code as text, or as `{"code": ...}`.

    Args:
        place: which message, such as "message 3".
        raw: the JSON value under `tool_calls`; None or an empty list means no calls.
        tools: the tools that may be called.
        padded: leave out nulls in arguments that Arrow put there.

    Raises:
        BadRecordError: a call is malformed, its arguments are not JSON, or its tool is not declared.
    """
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise BadRecordError("bad tool call", f"{place} needs a list as `tool_calls`, not {shown(raw)}")
    return tuple(_parse_call(place, call, tools, padded) for call in raw)


def _parse_call(place: str, raw: object, tools: DeclaredTools, padded: bool) -> ToolCall:
    if not isinstance(raw, Mapping):
        raise BadRecordError("bad tool call", f"{place}: a tool call must be an object, not {shown(raw)}")
    for key, value in raw.items():
        if key not in _CALL_KEYS and value not in (None, "", [], {}):
            raise BadRecordError("bad tool call", f"{place}: a tool call has {unknown('key', key, _CALL_KEYS)}")
    call = raw.get("function") or raw
    if not isinstance(call, Mapping):
        raise BadRecordError("bad tool call", f"{place} needs an object as `function`, not {shown(call)}")
    identifier = raw.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise BadRecordError("bad tool call", f"{place}: a tool call's `id` must be text, not {shown(identifier)}")
    recipient = _recipient(place, call.get("name"), tools)
    tool = next((tool for tool in tools.functions if FUNCTIONS + tool.name == recipient), None)
    schema = json.loads(tool.schema) if tool is not None and tool.schema else None
    arguments = _arguments(place, recipient, call.get("arguments"), schema, padded)
    return ToolCall(recipient, arguments, identifier or None)


def _recipient(place: str, name: object, tools: DeclaredTools) -> str:
    """The declared tool of this name, given with or without the namespace `functions.`."""
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


def _arguments(place: str, recipient: str, raw: object, schema: JsonObject | None, padded: bool) -> str:
    what = f"{place}: `arguments` of `{recipient.removeprefix(FUNCTIONS)}`"
    if recipient == "python":
        code = raw.get("code") if isinstance(raw, Mapping) and set(raw) == {"code"} else raw
        if not isinstance(code, str) or not code.strip():
            raise BadRecordError("bad arguments", f"{what} must be code as text, not {shown(code)}")
        json_text(what, code)
        return code
    if raw is None or (isinstance(raw, str) and not raw.strip()):
        if required := (schema or {}).get("required"):
            raise BadRecordError("bad arguments", f"{what} are empty, and `{required[0]}` is required")
        return "{}"
    try:
        value = parse_json(raw, what, inside=True) if isinstance(raw, str) else raw
    except BadRecordError as error:
        raise BadRecordError("bad arguments", error.reason) from None
    if not isinstance(value, Mapping):
        raise BadRecordError("bad arguments", f"{what} must be an object, not {shown(value)}")
    if padded and not isinstance(raw, str):
        value = without_padding_nulls(what, dict(value), None if schema is None else dict(schema))
    return json_text(what, value)
