"""The forms that a record may hold a conversation in, each brought to a list of OpenAI-style messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.config.keys import suggest_word
from finetune.config.schema import DataForm
from finetune.data.columns import as_yaml, propose_columns
from finetune.data.message import BadRowError, shown, unknown
from finetune.data.tools import parse_json

KEYS_OF_FORM: dict[DataForm, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The keys that a record of each form must have, and by which it is told."""

_MORE_KEYS: dict[DataForm, tuple[str, ...]] = {
    "messages": ("system",),
    "sharegpt": ("system",),
    "alpaca": ("system", "input", "history"),
    "prompt_completion": ("system",),
    "text": (),
}
"""The keys that a record of each form may have besides."""

_KEYS_OF_ALL = (
    "id", "answer", "tools", "functions", "builtin_tools", "reasoning_effort", "model_identity", "conversation_date",
)  # fmt: skip

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}


def fitting_forms(raw: Mapping[str, Any]) -> list[DataForm]:
    """The forms whose keys a record has; a key whose value is null counts as absent."""
    return [form for form, keys in KEYS_OF_FORM.items() if all(raw.get(key) is not None for key in keys)]


def detect_form(raw: Mapping[str, Any]) -> DataForm:
    """Tell a record's form from its keys; a key whose value is null counts as absent.

    Raises:
        BadRowError: no form fits, or more than one.
    """
    fitting = fitting_forms(raw)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " or ".join(f"`{form}`" for form in fitting)
        reason = f"the record could be of form {names}: set the source's `form`, such as `form: {fitting[0]}`"
        raise BadRowError("ambiguous form", reason)
    wanted = {key for keys in KEYS_OF_FORM.values() for key in keys}
    near = next((question for key in raw if (question := suggest_word(str(key), sorted(wanted)))), None)
    if columns := propose_columns(raw):
        near = f"write what it has beside the path, such as `{as_yaml(columns)}`"
    raise BadRowError(
        "no messages",
        f"the record has no `messages` nor another form's keys (conversations; instruction and output; prompt and "
        f"completion; text), only {', '.join(map(str, raw)) or 'nothing'}" + (f"; {near}" if near else ""),
    )


def unused_keys(raw: Mapping[str, Any], form: DataForm) -> list[str]:
    """Keys of a record that nothing of it is read from, such as `thinking` beside `prompt`; empty ones do not count.

    Args:
        raw: the whole record.
        form: the one that it is read as, not `auto`.
    """
    read = {*KEYS_OF_FORM[form], *_MORE_KEYS[form], *_KEYS_OF_ALL}
    return [str(key) for key, value in raw.items() if key not in read and value not in (None, "")]


def to_messages(raw: Mapping[str, Any], form: DataForm) -> object:
    """Bring a record to what `parse_messages` reads.

    Args:
        raw: the whole record.
        form: any but `auto` and `text`.

    Returns:
        The record's own `messages`, unchecked, or messages made from its other keys. The record's `system` text stands
        first in any form, once. An Alpaca `input` follows the instruction after a blank line.

    Raises:
        BadRowError: a key of the form is missing or of the wrong kind.
    """
    for key in KEYS_OF_FORM[form]:
        if raw.get(key) is None:
            raise BadRowError("key of form missing", f"a record of form `{form}` needs `{key}`")
    if form == "messages":
        return _with_system(raw, _decoded("messages", raw))
    if form == "sharegpt":
        return _from_sharegpt(raw)
    if form == "alpaca":
        return _from_alpaca(raw)
    prompt = _as_messages("prompt", raw["prompt"], "user")
    return _with_system(raw, prompt + _as_messages("completion", raw["completion"], "assistant"))


def _with_system(raw: Mapping[str, Any], messages: object) -> object:
    """The messages after the record's `system` text, unless they begin with the same one."""
    system = _system(raw)
    if not isinstance(messages, list) or messages[:1] == system:
        return messages
    return system + messages


def _from_sharegpt(raw: Mapping[str, Any]) -> object:
    turns = _decoded("conversations", raw)
    if not isinstance(turns, list):
        raise BadRowError("no messages", f"`conversations` must be a list, not {shown(turns)}")
    return _with_system(raw, [_sharegpt_turn(number, turn) for number, turn in enumerate(turns, start=1)])


def _sharegpt_turn(number: int, turn: object) -> dict[str, Any]:
    place = f"turn {number}"
    if not isinstance(turn, Mapping):
        raise BadRowError("not a message", f"{place} must be an object with `from` and `value`, not {shown(turn)}")
    if "role" in turn and "from" not in turn:
        raise BadRowError(
            "not a message",
            f"{place} has `role`, not `from`: map the column to `messages` with `columns: {{messages: conversations}}`",
        )
    for key, value in turn.items():
        if key not in ("from", "value") and value is not None:
            raise BadRowError("unknown message key", f"{place} has {unknown('key', key, ('from', 'value'))}")
    role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn.get("from"), str) else None
    if role is None:
        raise BadRowError("unknown role", f"{place} has {unknown('role', turn.get('from'), list(_SHAREGPT_ROLES))}")
    if role == "function_call":
        call = parse_json(f"{place}: the call", turn["value"]) if isinstance(turn.get("value"), str) else None
        return {"role": "assistant", "tool_calls": call if isinstance(call, list) else [call]}
    return {"role": role, "content": turn.get("value")}


def _decoded(key: str, raw: Mapping[str, Any]) -> object:
    """A value, or what it holds if it is a list as JSON text, which is how tables without nested types hold it."""
    value = raw[key]
    return parse_json(f"`{key}`", value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def _from_alpaca(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = _system(raw)
    history = raw.get("history")
    if history is not None and not isinstance(history, list):
        raise BadRowError("bad history", f"`history` must be a list of pairs of texts, not {shown(history)}")
    for pair in history or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError("bad history", f"`history` must hold pairs of texts, not {shown(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    instruction, given = raw["instruction"], raw.get("input")
    if given is not None and not isinstance(given, str):
        raise BadRowError("input is not text", f"`input` must be text, not {shown(given)}")
    if isinstance(instruction, str) and given:
        instruction = f"{instruction}\n\n{given}"
    return [*messages, {"role": "user", "content": instruction}, {"role": "assistant", "content": raw["output"]}]


def _system(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The record's `system` text as a message; empty text, which converters write, is none."""
    if not isinstance(raw.get("system"), str | None):
        raise BadRowError("system is not text", f"`system` must be text, not {shown(raw['system'])}")
    return [{"role": "system", "content": raw["system"]}] if raw.get("system") not in (None, "") else []


def _as_messages(key: str, value: object, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise BadRowError(f"{key} is not text", f"`{key}` must be text or a list of messages, not {shown(value)}")
