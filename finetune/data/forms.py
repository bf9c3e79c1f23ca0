"""Read each form of a record (messages, ShareGPT, Alpaca, prompt and completion, text) as a conversation."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Any, get_args

from finetune.config.schema import DataForm, ReasoningEffortName
from finetune.config.suggest import suggest_word
from finetune.data.checks import BadRecordError, checked_text, parse_json, shown, unknown
from finetune.data.conversation import Conversation
from finetune.data.foreign_messages import THINKING_KEYS, WEIGHT_KEYS, from_hermes
from finetune.data.parse_messages import parse_messages, parse_tools
from finetune.data.preferences import (
    PREFERENCE_KEYS,
    PREFERENCE_OPTIONAL_KEYS,
    check_label,
    parse_preference,
    preference_form,
)
from finetune.data.tool_schemas import is_padded
from finetune.files import JsonObject

KEYS_OF_FORM: dict[DataForm, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "hermes": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    **PREFERENCE_KEYS,
}
"""The keys that a record of each form must have, and by which it is recognised."""

_OPTIONAL_KEYS: dict[DataForm, tuple[str, ...]] = {
    "messages": ("system",),
    "sharegpt": ("system",),
    "hermes": (),
    "alpaca": ("system", "input", "history", *THINKING_KEYS),
    "prompt_completion": ("system", *THINKING_KEYS),
    "text": (),
    **PREFERENCE_OPTIONAL_KEYS,
}
_OVERRIDES = ("reasoning_effort", "model_identity", "conversation_date")
_KEYS_OF_ALL = ("id", "answer", "tools", "functions", "builtin_tools", *_OVERRIDES)
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool": "tool",
}
_COLUMN_NAMES = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("question", "query", "input", "instruction", "user", "problem"),
    "completion": ("response", "reply", "output", "target", "assistant", "long_answer", "answer", "solution"),
    "text": ("content", "document", "passage", "article", "body"),
}
"""Our key -> names that other data sets give it, likeliest first."""
_MEDIA_KEYS = {
    "image": "an image", "images": "images", "video": "a video", "videos": "videos", "audio": "audio",
    "audios": "audio",
}  # fmt: skip
_LONG_WORD = re.compile(r"[^\W\d_]{20001}")  # encoding takes time quadratic in its length: 3 s for 100,000 letters


def parse_conversation(raw: JsonObject, form: DataForm = "auto") -> Conversation:
    """Check a record and read its conversation.

    Args:
        raw: the whole record as JSON gave it, columns renamed; keys that belong to no form (`id`, `answer`, fields of
            `where`) are ignored.
        form: the record's form; `auto` recognises it by the keys.

    Raises:
        BadRecordError: it cannot be used.
    """
    if form == "auto":
        form = detect_form(raw)
    _check_no_media(raw)
    if form == "text":
        conversation = _plain_text(raw)
    elif form in PREFERENCE_KEYS:
        conversation = parse_preference(raw, form, lambda turns: _from_sharegpt(turns, None), _parse_overrides(raw))
    else:
        tools = parse_tools(raw)
        messages = parse_messages(to_messages(raw, form), tools, padded=is_padded(raw))
        conversation = Conversation(messages, form=form, tools=tools, **_parse_overrides(raw))
    return conversation


def _check_no_media(raw: JsonObject) -> None:
    """Refuse a record whose conversation is about files beside it, as ms-swift and transformers store images."""
    for key, what in _MEDIA_KEYS.items():
        value = raw.get(key)
        is_file = isinstance(value, Mapping) and (value.get("bytes") is not None or value.get("path") is not None)
        if is_file or (isinstance(value, list) and any(value)):
            raise BadRecordError("not text", f"the record has {what} (`{key}`), which gpt-oss cannot read")


def with_our_columns(raw: JsonObject) -> JsonObject:
    """A record of a well-known data set under our keys: Capybara's `conversation`, Dolly's `context` and `response`.

    Any other record is returned as it is.
    """
    turns = raw.get("conversation")
    if (
        isinstance(turns, list)
        and turns
        and all(isinstance(t, Mapping) and t.keys() >= {"input", "output"} for t in turns)
    ):
        messages = [
            {"role": role, "content": turn[key]}
            for turn in turns
            for key, role in (("input", "user"), ("output", "assistant"))
        ]
        return {key: value for key, value in raw.items() if key != "conversation"} | {"messages": messages}
    if {"instruction", "context", "response"} <= raw.keys() and not raw.keys() & {"input", "output", "messages"}:
        names = {"context": "input", "response": "output"}
        return {names.get(key, key): value for key, value in raw.items()}
    return raw


def fitting_forms(raw: JsonObject) -> list[DataForm]:
    """The forms whose keys a record has; a key whose value is null counts as absent.

    A preference record may repeat its chosen conversation under `messages` or `conversations`, so its form goes first.
    """
    if preferred := preference_form(raw):
        return [preferred]
    others = {form: keys for form, keys in KEYS_OF_FORM.items() if form not in (*PREFERENCE_KEYS, "hermes")}
    return [form for form, keys in others.items() if all(raw.get(key) is not None for key in keys)]


def detect_form(raw: JsonObject) -> DataForm:
    """Recognise a record's form by its keys; a key whose value is null counts as absent.

    Raises:
        BadRecordError: no form fits, or more than one; or a label is not boolean (`check_label`).
    """
    check_label(raw)
    fitting = fitting_forms(raw)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " or ".join(f"`{form}`" for form in fitting)
        reason = f"the record could be of form {names}: set the source's `form`, such as `form: {fitting[0]}`"
        raise BadRecordError("ambiguous form", reason)
    known = sorted({key for keys in KEYS_OF_FORM.values() for key in keys})
    advice = next((question for key in raw if (question := suggest_word(str(key), known))), None)
    if columns := propose_columns(raw):
        written = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        advice = f"write what it has beside the path, such as `columns: {{{written}}}`"
    raise BadRecordError(
        "no messages",
        f"the record has no `messages` nor another form's keys (conversations; instruction and output; prompt and "
        f"completion; text; chosen and rejected), only {', '.join(map(str, raw)) or 'nothing'}"
        + (f"; {advice}" if advice else ""),
    )


def propose_columns(raw: JsonObject) -> dict[str, str]:
    """Guess which columns of a record that fits no form hold its conversation: a proposal for the user to confirm.

    Args:
        raw: the record; its keys may be in any case.

    Returns:
        A source's `columns`, our key -> its key, or nothing if no guess is good enough.
    """
    turns = raw.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        return {"messages": "conversations"}
    lists = {key: value for key, value in raw.items() if not isinstance(value, str) or value.lstrip()[:1] == "["}
    if listed := _find_column(lists, "messages", (list, str)):
        return {"messages": listed}
    if (prompt := _find_column(raw, "prompt", str)) and (completion := _find_column(raw, "completion", str, prompt)):
        return {ours: theirs for ours, theirs in (("prompt", prompt), ("completion", completion)) if ours != theirs}
    text = _find_column(raw, "text", str)
    return {"text": text} if text else {}


def _find_column(raw: JsonObject, ours: str, kind: type | tuple[type, ...], taken: str | None = None) -> str | None:
    lowered = {str(key).strip().lower(): key for key, value in raw.items() if isinstance(value, kind) and key != taken}
    return next((lowered[name] for name in (ours, *_COLUMN_NAMES[ours]) if name in lowered), None)


def unused_keys(raw: JsonObject, form: DataForm) -> list[str]:
    """Keys of a record that nothing is read from, such as `thinking` beside `prompt`; empty ones do not count.

    Args:
        raw: the whole record.
        form: the form that it is read as, not `auto`.
    """
    read = {*KEYS_OF_FORM[form], *_OPTIONAL_KEYS[form], *_KEYS_OF_ALL}
    return [str(key) for key, value in raw.items() if key not in read and value not in (None, "")]


def to_messages(raw: JsonObject, form: DataForm) -> object:
    """Convert a record to the input of `parse_messages`.

    Args:
        raw: the whole record.
        form: any but `auto` and `text`.

    Returns:
        The record's own `messages`, unchecked, or messages made from its other keys. The record's `system` text comes
        first in any form, once. An Alpaca `input` follows the instruction after a blank line.

    Raises:
        BadRecordError: a key of the form is missing or of the wrong kind.
    """
    for key in KEYS_OF_FORM[form]:
        if raw.get(key) is None:
            raise BadRecordError("key of form missing", f"a record of form `{form}` needs `{key}`")
    if form == "messages":
        return _with_system(raw.get("system"), _decoded_list("messages", raw["messages"]))
    if form == "sharegpt":
        return _from_sharegpt(raw["conversations"], raw.get("system"))
    if form == "hermes":
        return from_hermes(raw["conversations"])
    if form == "alpaca":
        return _with_thinking(raw, _from_alpaca(raw))
    prompt = _as_messages("prompt", raw["prompt"], "user")
    answer = _with_thinking(raw, _as_messages("completion", raw["completion"], "assistant"))
    return _with_system(raw.get("system"), prompt + answer)


def _with_thinking(raw: JsonObject, messages: list[Any]) -> list[Any]:
    """The messages with the thinking of a column of its own in the last one."""
    given = {key: raw[key] for key in THINKING_KEYS if raw.get(key) not in (None, "")}
    if not given or not messages or not isinstance(messages[-1], Mapping):
        return messages
    return [*messages[:-1], {**messages[-1], **given}]


def _from_sharegpt(conversations: object, system: object) -> object:
    turns = _decoded_list("conversations", conversations)
    if not isinstance(turns, list):
        raise BadRecordError("no messages", f"`conversations` must be a list, not {shown(turns)}")
    if turns and all(isinstance(turn, str) for turn in turns):  # as LIMA has them: question, answer, question, ...
        roles = ("human", "gpt")
        turns = [{"from": roles[number % 2], "value": turn} for number, turn in enumerate(turns)]
    return _with_system(system, [_sharegpt_turn(number, turn) for number, turn in enumerate(turns, start=1)])


def _sharegpt_turn(number: int, turn: object) -> JsonObject:
    place = f"turn {number}"
    if not isinstance(turn, Mapping):
        raise BadRecordError("not a message", f"{place} must be an object with `from` and `value`, not {shown(turn)}")
    if "role" in turn and "from" not in turn:
        raise BadRecordError(
            "not a message",
            f"{place} has `role`, not `from`: map the column to `messages` with `columns: {{messages: conversations}}`",
        )
    for key, value in turn.items():
        if key not in ("from", "value", *WEIGHT_KEYS) and value not in (None, "", [], {}):
            raise BadRecordError("unknown message key", f"{place} has {unknown('key', key, ('from', 'value'))}")
    weights = {key: turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None}
    role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn.get("from"), str) else None
    if role is None:
        raise BadRecordError("unknown role", f"{place} has {unknown('role', turn.get('from'), list(_SHAREGPT_ROLES))}")
    if role == "function_call":
        text = turn.get("value")
        call = parse_json(text, f"{place}: the call", inside=True) if isinstance(text, str) else None
        return {"role": "assistant", "tool_calls": call if isinstance(call, list) else [call], **weights}
    return {"role": role, "content": turn.get("value"), **weights}


def _from_alpaca(raw: JsonObject) -> list[JsonObject]:
    messages = _system_message(raw.get("system"))
    history = raw.get("history")
    if history is not None and not isinstance(history, list):
        raise BadRecordError("bad history", f"`history` must be a list of pairs of texts, not {shown(history)}")
    for pair in history or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecordError("bad history", f"`history` must hold pairs of texts, not {shown(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    instruction, given = raw["instruction"], raw.get("input")
    if given is not None and not isinstance(given, str):
        raise BadRecordError("input is not text", f"`input` must be text, not {shown(given)}")
    if isinstance(instruction, str) and given:
        instruction = f"{instruction}\n\n{given}"
    return [*messages, {"role": "user", "content": instruction}, {"role": "assistant", "content": raw["output"]}]


def _as_messages(key: str, value: object, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise BadRecordError(f"{key} is not text", f"`{key}` must be text or a list of messages, not {shown(value)}")


def _decoded_list(key: str, value: object) -> object:
    """A value, decoded if it is a list as JSON text, which is how tables without nested types store it."""
    return parse_json(value, f"`{key}`", inside=True) if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def _with_system(system: object, messages: object) -> object:
    """The messages after the record's `system` text, unless they begin with the same one."""
    first = _system_message(system)
    if not isinstance(messages, list) or messages[:1] == first:
        return messages
    return first + messages


def _system_message(system: object) -> list[JsonObject]:
    """The record's `system` text as a message; none for empty text, which converters write."""
    if not isinstance(system, str | None):
        raise BadRecordError("system is not text", f"`system` must be text, not {shown(system)}")
    return [{"role": "system", "content": system}] if system else []


def _plain_text(raw: JsonObject) -> Conversation:
    for key in (*KEYS_OF_FORM["text"], "tools", "builtin_tools", *_OVERRIDES):
        if key != "text" and raw.get(key) is not None:
            raise BadRecordError("key of another form", f"plain text has no place for `{key}`")
    text = checked_text("the record", "text", raw.get("text"))
    if _LONG_WORD.search(text):
        raise BadRecordError("word too long", "the record has more than 20,000 letters in a row, which is no text")
    return Conversation((), text=text, form="text")


def _parse_overrides(raw: JsonObject) -> JsonObject:
    given = {key: raw[key] for key in _OVERRIDES if raw.get(key) is not None}
    efforts = get_args(ReasoningEffortName)
    if "reasoning_effort" in given and given["reasoning_effort"] not in efforts:
        reason = f"the record has {unknown('reasoning effort', given['reasoning_effort'], efforts)}"
        raise BadRecordError("unknown reasoning effort", reason)
    if "model_identity" in given:
        checked_text("the record", "model_identity", given["model_identity"])
    if "conversation_date" in given and not _is_date(given["conversation_date"]):
        reason = f"`conversation_date` must be a date such as 2025-06-28, not {shown(given['conversation_date'])}"
        raise BadRecordError("bad conversation date", reason)
    return given


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False
