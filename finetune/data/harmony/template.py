"""Differences between the Jinja template published with the weights and openai-harmony's rendering.

Only texts are made here; they are encoded like any other, so that no text becomes a control token (with the template
and a Hugging Face tokenizer it does). Where the template raises, crashes or silently drops something, the record is
bad. Source: the behaviour of `chat_template.jinja` of openai/gpt-oss-20b (sha256 a4c9919c...), compared record by
record in tests/data/test_template.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.data.checks import BadRecordError, JsonObject
from finetune.data.conversation import DeclaredTools, Message

_FORBIDDEN = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
_LONGEST_ITEM_TYPE = 50
_PLAIN_TYPES = {"number": "number", "integer": "number", "boolean": "boolean"}


def to_template_form(index: int, message: Message) -> Message:
    """Change a message so that harmony's encoding of it gives the template's tokens.

    A tool's result is JSON-quoted; text beside a tool call becomes analysis.

    Args:
        index: its index in the conversation.
        message: the message.

    Raises:
        BadRecordError: the template cannot write it.
    """
    place = f"message {index + 1}"
    if message.role == "tool":
        return replace(message, content=json.dumps(message.content, ensure_ascii=False))
    if message.role != "assistant":
        return message
    for text in (message.content, message.thinking or ""):
        for tag in _FORBIDDEN:
            if tag in text:
                raise _cannot(f"{place} contains {tag}, which the template refuses")
    if not message.tool_calls:
        if message.channel == "commentary":
            raise _cannot(f"{place} is commentary without a tool call, and the template would write it as an answer")
        return message
    if len(message.tool_calls) > 1:
        raise _cannot(f"{place} has {len(message.tool_calls)} tool calls, and the template would write only the first")
    if message.tool_calls[0].is_builtin:
        name = message.tool_calls[0].recipient
        raise _cannot(f"{place} calls {name}, and the template would write it as the function functions.{name}")
    if message.content and message.thinking is not None:
        raise _cannot(f"{place} has content and thinking beside a tool call, and the template takes only one of them")
    return replace(message, content="", thinking=message.content or message.thinking)


def developer_text(instructions: str | None, tools: DeclaredTools) -> str:
    """Write the developer message's text: instructions, a blank line even if nothing follows, functions.

    Raises:
        BadRecordError: the template would fail on a function.
    """
    text = "" if instructions is None else f"# Instructions\n\n{instructions}\n\n"
    if not tools.functions:
        return text
    lines = [text + "# Tools\n\n## functions\n\nnamespace functions {\n\n"]
    for tool in tools.functions:
        if not tool.description:
            raise _cannot(f"tool `{tool.name}` has no description, and the template needs one")
        schema = json.loads(tool.schema) if tool.schema else None
        signature = _signature(tool.name, schema if isinstance(schema, dict) else {})
        lines.append(f"// {tool.description}\ntype {tool.name} = {signature} => any;\n\n")
    return "".join(lines) + "} // namespace functions"


def _signature(name: str, schema: JsonObject) -> str:
    properties = schema.get("properties")
    if not properties:
        return "()"
    if not isinstance(properties, dict):
        raise _cannot(f"tool `{name}`: `properties` of its parameters must be an object")
    required = _list(schema, "required")
    lines = [_parameter(key, spec, key in required) for key, spec in properties.items()]
    return "(_: {\n" + "".join(lines) + "})"


def _parameter(key: str, raw: object, is_required: bool) -> str:
    spec = raw if isinstance(raw, dict) else {}
    description = spec.get("description")
    comment = ""
    if description:
        comment = f"// {_only_text('description', description)}\n"
    text = f"{comment}{key}{'' if is_required else '?'}: {_typescript(spec)}"
    if "default" in spec:
        default = spec["default"]
        if spec.get("enum"):
            text += f", // default: {_only_text('default', default)}"
        elif spec.get("oneOf"):
            text += f"// default: {_only_text('default', default)}"
        else:
            text += f", // default: {json.dumps(default, ensure_ascii=False)}"
    return text + ",\n"


def _typescript(raw: object) -> str:
    """Write a JSON schema as the template does, including the spaces and line breaks of the template's source."""
    spec: JsonObject = raw if isinstance(raw, dict) else {}
    kind = spec.get("type")
    null = " | null" if spec.get("nullable") else ""
    if kind == "array":
        return (_array(spec["items"]) if spec.get("items") else "any[]") + null
    if isinstance(kind, list) and kind:
        return " | ".join(map(str, kind))
    if spec.get("oneOf"):
        return _one_of(_list(spec, "oneOf"))
    if kind == "string":
        values = _list(spec, "enum")
        return '"' + '" | "'.join(map(str, values)) + '"' if values else f"string{null}"
    if isinstance(kind, str) and kind in _PLAIN_TYPES:
        return _PLAIN_TYPES[kind]
    if kind == "object":
        return _object(spec)
    return "any"


def _array(items: object) -> str:
    kind = items.get("type") if isinstance(items, dict) else None
    if isinstance(kind, str) and kind in (*_PLAIN_TYPES, "string"):
        return _PLAIN_TYPES.get(kind, "string") + "[]"
    inner = _typescript(items)
    return "any[]" if inner == "object | object" or len(inner) > _LONGEST_ITEM_TYPE else inner + "[]"


def _object(spec: JsonObject) -> str:
    properties = spec.get("properties")
    if not properties:
        return "object"
    if not isinstance(properties, dict):
        raise _cannot("`properties` of a function's parameters must be an object for the template")
    required = _list(spec, "required")
    members = [
        f"{key}{'' if key in required else '?'}: \n                {_typescript(value)}"
        for key, value in properties.items()
    ]
    return "{\n" + ", ".join(members) + "}"


def _one_of(variants: Sequence[Any]) -> str:
    texts = []
    for variant in variants:
        spec = variant if isinstance(variant, dict) else {}
        text = _typescript(spec)
        if spec.get("description"):
            text += f"// {_only_text('description', spec['description'])}"
        if "default" in spec:
            text += f"                    // default: {json.dumps(spec['default'], ensure_ascii=False)}"
        texts.append(text)
    return " | \n".join(texts)


def _list(spec: JsonObject, key: str) -> list[Any]:
    value = spec.get(key) or []
    if not isinstance(value, list):
        raise _cannot(f"`{key}` in a function's parameters must be a list for the template")
    return value


def _only_text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _cannot(f"`{key}` in a function's parameters must be text for the template")
    return value


def _cannot(reason: str) -> BadRecordError:
    return BadRecordError("not in the template", f"{reason}; data.convention=harmony can")
