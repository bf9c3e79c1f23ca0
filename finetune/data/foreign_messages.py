"""Messages of other libraries and APIs, put into the one form that `parse_messages` checks.

Read: content as a list of parts (OpenAI, Anthropic, transformers), `function_call` and role `function` (OpenAI until
2023), roles `tool_call` and `tool_response` (ms-swift), stored API answers with their extra keys, `weight` (OpenAI) and
`loss` (ms-swift) of a message. A key that is null, "" or [] counts as absent where it may be absent: tables and APIs
write one for every message. What cannot be a message of gpt-oss is refused by what it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.checks import BadRecordError, parse_json, shown

Keys = dict[str, Any]
"""A message while it is put into our form."""

THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")
WEIGHT_KEYS = ("weight", "loss")
_ROLES = {"function": "tool", "tool_response": "tool", "observation": "tool"}
_CALL_ROLE = "tool_call"
# Keys of stored API answers that say nothing of what was written.
_ABOUT_THE_ANSWER = (
    "annotations", "finish_reason", "stop_reason", "logprobs", "index", "id", "object", "created", "model", "usage",
    "status", "provider_specific_fields", "reasoning_details",
)  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING_PARTS = {"thinking": "thinking", "reasoning": "reasoning", "reasoning_text": "text"}
_MEDIA = {"image": "an image", "video": "a video", "audio": "audio", "file": "a file", "document": "a document"}


def plain_messages(raw: Sequence[Any]) -> list[object]:
    """Messages in our own keys; calls that stand in messages of their own are joined into one message.

    Raises:
        BadRecordError: a part or a key that has no place in a conversation with gpt-oss.
    """
    plain: list[object] = []
    for number, message in enumerate(raw, start=1):
        if not isinstance(message, Mapping):
            plain.append(message)
            continue
        place = f"message {number}"
        keys = _plain_message(place, message)
        if message.get("role") == _CALL_ROLE:
            previous = plain[-1] if plain else None
            if _is_before_calls(previous, raw[number - 2] if number > 1 else None):
                assert isinstance(previous, dict)
                previous["tool_calls"] = [*previous.get("tool_calls", []), *keys["tool_calls"]]
                previous.setdefault("content", None)
                continue
        plain.append(keys)
    has_call_roles = any(isinstance(message, Mapping) and message.get("role") == _CALL_ROLE for message in raw)
    return _numbered(plain) if has_call_roles else plain


def _is_before_calls(previous: object, raw_previous: object) -> bool:
    """Whether calls that follow belong to this message: one of calls alone, or an assistant's thinking without text."""
    if not isinstance(previous, dict) or previous.get("role") != "assistant":
        return False
    is_calls = isinstance(raw_previous, Mapping) and raw_previous.get("role") == _CALL_ROLE
    return is_calls or (not previous.get("content") and "tool_calls" not in previous)


def _plain_message(place: str, message: Mapping[str, Any]) -> Keys:
    keys = {str(key): value for key, value in message.items() if not _is_absent(str(key), value)}
    role = keys.get("role")
    if role == _CALL_ROLE:
        return _calls_of_their_own(place, keys)
    if isinstance(role, str):
        keys["role"] = _ROLES.get(role, role)
    for key in _ABOUT_THE_ANSWER:
        keys.pop(key, None)
    if "refusal" in keys:
        raise BadRecordError("refusal", f"{place} has a `refusal`: the API refused, and there is no answer to learn")
    if "audio" in keys:
        raise BadRecordError("not text", f"{place} has audio, which gpt-oss cannot write")
    if isinstance(keys.get("content"), list):
        _join_parts(place, keys)
    if "function_call" in keys:
        if "tool_calls" in keys:
            raise BadRecordError("bad tool call", f"{place} has `function_call` and `tool_calls`: keep one")
        keys["tool_calls"] = [keys.pop("function_call")]
    _join_thinking(place, keys)
    _read_weight(place, keys)
    return keys


def _is_absent(key: str, value: object) -> bool:
    if value is None:
        return True
    return key != "content" and (value == [] or value == "" or value == {})


def _calls_of_their_own(place: str, keys: Keys) -> Keys:
    content = keys.get("content")
    call = parse_json(content, f"{place}: the call", inside=True) if isinstance(content, str) else content
    rest = {key: value for key, value in keys.items() if key in WEIGHT_KEYS}
    plain = {"role": "assistant", "tool_calls": call if isinstance(call, list) else [call], **rest}
    _read_weight(place, plain)
    return plain


def _join_parts(place: str, keys: Keys) -> None:
    """Replace a list of parts by their text, and set `thinking` from parts of thinking."""
    texts, thoughts = [], []
    for part in keys["content"]:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind is None and isinstance(part, Mapping) and isinstance(part.get("text"), str):
            kind = "text"
        value = part.get(_THINKING_PARTS.get(str(kind), "text")) if isinstance(part, Mapping) else None
        if kind in _TEXT_PARTS and isinstance(value, str):
            texts.append(value)
        elif kind in _THINKING_PARTS and isinstance(value or part.get("text"), str):
            thoughts.append(value or part["text"])
        else:
            raise _wrong_part(place, kind, part)
    keys["content"] = "".join(texts)
    if thoughts:
        if any(key in keys for key in THINKING_KEYS):
            raise BadRecordError("two thinkings", f"{place} has parts of thinking and a key for it: keep one")
        keys["thinking"] = "\n\n".join(thoughts)


def _wrong_part(place: str, kind: object, part: object) -> BadRecordError:
    if isinstance(kind, str):
        for word, what in _MEDIA.items():
            if word in kind:
                return BadRecordError("not text", f"{place} has {what} part ({kind}), which gpt-oss cannot read")
        if kind == "refusal":
            return BadRecordError("refusal", f"{place} has a `refusal` part: there is no answer to learn")
        if kind in ("tool_use", "tool_result", "tool_call"):
            advice = "give calls under `tool_calls` and results as messages of role `tool`"
            return BadRecordError("bad tool call", f"{place} has a part `{kind}` of another API: {advice}")
        if kind == "redacted_thinking":
            return BadRecordError("not text", f"{place} has thinking that the API encrypted")
    what = f"`{kind}`" if isinstance(kind, str) else shown(part)
    known = ", ".join((*_TEXT_PARTS[:1], *_THINKING_PARTS))
    return BadRecordError("not text", f"{place} has a content part {what}; known are {known}")


def _join_thinking(place: str, keys: Keys) -> None:
    """One key for thinking; the same text under two of them, as servers return it, is one thinking."""
    given = {key: keys.pop(key) for key in THINKING_KEYS if key in keys}
    if len(given) > 1 and len(set(map(str, given.values()))) > 1:
        raise BadRecordError(
            "two thinkings", f"{place} has {' and '.join(f'`{key}`' for key in given)} of different text: keep one"
        )
    if given:
        keys["thinking"] = next(iter(given.values()))


def _read_weight(place: str, keys: Keys) -> None:
    """One key for OpenAI's `weight` and ms-swift's `loss`: a factor of the message's loss weights, 0 for context."""
    given = [(key, keys.pop(key)) for key in WEIGHT_KEYS if key in keys]
    if not given:
        return
    if len(given) > 1:
        raise BadRecordError("bad weight", f"{place} has `weight` and `loss`: keep one")
    ((key, value),) = given
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1e3:
        raise BadRecordError("bad weight", f"{place} needs a number from 0 on as `{key}`, not {shown(value)}")
    if keys.get("role") != "assistant":
        if value:
            raise BadRecordError("bad weight", f"{place} is from the {keys.get('role')} and has `{key}`: only the "
                                 "assistant's messages are trained")  # fmt: skip
        return
    keys["weight"] = float(value)


def _numbered(messages: list[Any]) -> list[Any]:
    """Let results that name no call refer to the calls before them, in order: the calls get ids."""
    waiting: list[str] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        calls = message.get("tool_calls")
        if isinstance(calls, list) and all(isinstance(call, Mapping) and not call.get("id") for call in calls):
            waiting = [f"{number}.{place}" for place in range(len(calls))]
            message["tool_calls"] = [{**call, "id": name} for call, name in zip(calls, waiting, strict=True)]
        elif message.get("role") == "tool" and waiting and not message.keys() & {"tool_call_id", "name"}:
            message["tool_call_id"] = waiting.pop(0)
    return messages


# Hermes: calls and results as XML in the text


_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_HERMES_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                 "tool": "tool", "observation": "tool"}  # fmt: skip


def from_hermes(conversations: object) -> list[Keys]:
    """The messages of turns whose calls stand in `<tool_call>` and results in `<tool_response>`, as Hermes has them.

    A system turn that declares `<tools>` explains that syntax; the record's own `tools` take its place.

    Raises:
        BadRecordError: a turn is malformed, or a call is neither JSON nor a Python literal.
    """
    turns = (
        parse_json(conversations, "`conversations`", inside=True) if isinstance(conversations, str) else conversations
    )
    if not isinstance(turns, list):
        raise BadRecordError("no messages", f"`conversations` must be a list, not {shown(turns)}")
    messages: list[Keys] = []
    for number, turn in enumerate(turns, start=1):
        place = f"turn {number}"
        role = _HERMES_ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, Mapping) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        if role is None or not isinstance(text, str):
            raise BadRecordError("not a message", f"{place} must be an object with `from` and a text as `value`")
        if role == "system" and "<tools>" in text:
            continue
        weights = {key: turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None}
        messages += _hermes_messages(place, role, text, weights)
    return _numbered(messages)


def _hermes_messages(place: str, role: str, text: str, weights: Keys) -> list[Keys]:
    if role == "tool":
        results = _RESULT.findall(text) or [text]
        return [{"role": "tool", "content": result} for result in results]
    calls = _CALL.findall(text) if role == "assistant" else []
    if not calls:
        return [{"role": role, "content": text, **weights}]
    rest = _CALL.sub("", text).strip()
    return [{"role": role, "content": rest, "tool_calls": [_hermes_call(place, call) for call in calls], **weights}]


def _hermes_call(place: str, text: str) -> object:
    try:
        return parse_json(text, f"{place}: the call", inside=True)
    except BadRecordError as error:
        try:  # the first Hermes data set writes Python's quotes
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise error from None
