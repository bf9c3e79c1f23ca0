"""The tools that a record declares and the calls that its assistant makes, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from finetune.config.keys import suggest_word
from finetune.data.message import FUNCTIONS, BadRowError, BuiltinTool, FunctionTool, ToolCall, shown, unknown

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
        BadRowError: either is malformed, a name cannot be written in harmony, or one is declared twice.
    """
    keys = [key for key in ("tools", "functions") if raw.get(key) is not None]
    if len(keys) == 2:
        raise BadRowError("bad tools", "the record has `tools` and `functions`: keep one")
    tools = _list(keys[0], raw[keys[0]]) if keys else []
    functions = tuple(_parse_function(number, tool) for number, tool in enumerate(tools, start=1))
    names = [tool.name for tool in functions]
    for name in names:
        if names.count(name) > 1:
            raise BadRowError("bad tools", f"`tools` declares `{name}` twice")
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
        BadRowError: a call is malformed, its arguments are not JSON, or nothing of its name is declared.
    """
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise BadRowError("bad tool call", f"{place} needs a list as `tool_calls`, not {shown(raw)}")
    return tuple(_parse_call(place, call, tools) for call in raw)


def parse_json(what: str, text: str) -> Any:
    """Decode JSON text found inside a record.

    Raises:
        BadRowError: it is not JSON, holds NaN or Infinity, or a key twice.
    """

    def refuse(constant: str) -> None:
        raise BadRowError("bad JSON inside", f"{what} holds {constant}, which is not JSON")

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise BadRowError("bad JSON inside", f"{what} holds a key twice in one object")
        return result

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=without_repeats)
    except (json.JSONDecodeError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise BadRowError("bad JSON inside", f"{what} is not JSON ({why}): {shown(text)}") from None


def json_text(what: str, value: object) -> str:
    """Encode a value as the JSON text that both conventions write: no escapes that are not needed.

    Raises:
        BadRowError: it holds half a character or a number that is none, which cannot be encoded.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise BadRowError("broken character", f"{what} holds half a character") from None
    except (ValueError, TypeError) as error:
        raise BadRowError("bad JSON inside", f"{what} cannot be written as JSON: {error}") from None
    return text


def _list(key: str, value: object) -> list[Any]:
    """A list, or JSON text of one, which is how tables without nested types hold it."""
    if isinstance(value, str):
        value = parse_json(f"`{key}`", value)
    if not isinstance(value, list):
        raise BadRowError("bad tools", f"`{key}` must be a list of tools, not {shown(value)}")
    return value


def _parse_function(number: int, raw: object) -> FunctionTool:
    place = f"tool {number}"
    if not isinstance(raw, Mapping):
        raise BadRowError("bad tools", f"{place} must be an object, not {shown(raw)}")
    if raw.get("type", "function") != "function":
        raise BadRowError("bad tools", f"{place} is of type {shown(raw['type'])}, not function")
    function = raw.get("function", raw)
    if not isinstance(function, Mapping):
        raise BadRowError("bad tools", f"{place} needs an object as `function`, not {shown(function)}")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadRowError("bad tools", f"{place} needs a name of letters, digits, _ and -, not {shown(name)}")
    if description is not None and not isinstance(description, str):
        raise BadRowError("bad tools", f"{place} needs text as `description`, not {shown(description)}")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise BadRowError("bad tools", f"{place} needs a JSON schema as `parameters`, not {shown(parameters)}")
    json_text(place, description)
    return FunctionTool(name, description or "", None if parameters is None else json_text(place, parameters))


def _parse_builtin(raw: object) -> tuple[BuiltinTool, ...]:
    if raw is None:
        return ()
    raw = _list("builtin_tools", raw)
    for name in raw:
        if name not in get_args(BuiltinTool):
            raise BadRowError("bad tools", f"`builtin_tools` has {unknown('tool', name, get_args(BuiltinTool))}")
    return tuple(cast(BuiltinTool, name) for name in get_args(BuiltinTool) if name in raw)


def _parse_call(place: str, raw: object, tools: DeclaredTools) -> ToolCall:
    if not isinstance(raw, Mapping):
        raise BadRowError("bad tool call", f"{place}: a tool call must be an object, not {shown(raw)}")
    for key, value in raw.items():
        if key not in _CALL_KEYS and value is not None:
            raise BadRowError("bad tool call", f"{place}: a tool call has {unknown('key', key, _CALL_KEYS)}")
    call = raw.get("function") or raw
    if not isinstance(call, Mapping):
        raise BadRowError("bad tool call", f"{place} needs an object as `function`, not {shown(call)}")
    identifier = raw.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise BadRowError("bad tool call", f"{place}: a tool call's `id` must be text, not {shown(identifier)}")
    recipient = _recipient(place, call.get("name"), tools)
    return ToolCall(recipient, _arguments(place, recipient, call.get("arguments")), identifier or None)


def _recipient(place: str, name: object, tools: DeclaredTools) -> str:
    """The declared tool that `name` means, with or without the namespace `functions.`."""
    known = tools.recipients
    if not isinstance(name, str):
        raise BadRowError("bad tool call", f"{place}: a tool call needs a name, not {shown(name)}")
    for candidate in (FUNCTIONS + name, name):
        if candidate in known:
            return candidate
    if not known:
        raise BadRowError("undeclared tool", f"{place} calls `{name}`, but the record declares no `tools`")
    short = [recipient.removeprefix(FUNCTIONS) for recipient in known]
    hint = suggest_word(name, short) or f"declared are {', '.join(short)}"
    raise BadRowError("undeclared tool", f"{place} calls `{name}`, which is not declared; {hint}")


def _arguments(place: str, recipient: str, raw: object) -> str:
    what = f"{place}: `arguments` of `{recipient.removeprefix(FUNCTIONS)}`"
    if recipient == "python":
        code = raw.get("code") if isinstance(raw, Mapping) and set(raw) == {"code"} else raw
        if not isinstance(code, str) or not code.strip():
            raise BadRowError("bad arguments", f"{what} must be code as text, not {shown(code)}")
        json_text(what, code)
        return code
    try:
        value = parse_json(what, raw) if isinstance(raw, str) else raw
    except BadRowError as error:
        raise BadRowError("bad arguments", error.reason) from None
    if not isinstance(value, Mapping):
        raise BadRowError("bad arguments", f"{what} must be an object, not {shown(value)}")
    return json_text(what, value)
