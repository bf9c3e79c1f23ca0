"""Values of unknown origin: the error for a record that cannot be used, and checks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.config.suggest import suggest_word


class BadRecordError(Exception):
    """A record that cannot be used. The command never shows it: reading turns it into a counted `BadRecord`.

    Args:
        kind: the group that it is counted in, such as "unknown role".
        reason: the fault of this record.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def checked_text(place: str, key: str, value: object) -> str:
    """Return `value` if it is text that can be encoded and is not blank.

    Args:
        place: the part of the record, such as "message 3".
        key: the value's key in it.

    Raises:
        BadRecordError: it is something else.
    """
    if not isinstance(value, str):
        raise BadRecordError(f"{key} is not text", f"{place} needs text as `{key}`, not {shown(value)}")
    if not value.strip():
        advice = "; leave the key out if there is none" if key == "thinking" else ""
        raise BadRecordError(f"empty {key}", f"{place} has empty `{key}`{advice}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRecordError("broken character", f"{place} contains half a character ({half}) in `{key}`") from None
    return value


def parse_json(text: str, what: str = "the line", *, inside: bool = False) -> Any:
    """Decode JSON and refuse repeated keys.

    Args:
        text: the JSON text.
        what: its name in messages.
        inside: it is a value inside a record. NaN and Infinity, which are not JSON, are refused there.

    Raises:
        BadRecordError: it is not JSON, nests too deeply, or an object has a key twice.
    """
    kind = "bad JSON inside" if inside else "broken JSON"

    def refuse(constant: str) -> None:
        raise BadRecordError(kind, f"{what} contains {constant}, which is not JSON")

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise BadRecordError(
                kind if inside else "repeated key", f"{what} has the key `{repeated}` twice in one object"
            )
        return result

    try:
        return json.loads(text, parse_constant=refuse if inside else None, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        detail = f"{error.msg}: {shown(text)}" if inside else f"{error.msg} (column {error.colno})"
        raise BadRecordError(kind, f"{what} is not JSON: {detail}") from None
    except RecursionError:
        raise BadRecordError(kind, f"{what} nests JSON too deeply") from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise BadRecordError(kind, f"{what} contains a value that cannot be read: {str(error)[:60]}") from None


def json_text(what: str, value: object) -> str:
    """Encode a value as the JSON text that both conventions write: only necessary escapes.

    Raises:
        BadRecordError: it contains half a character, or a number that JSON has no form for.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise BadRecordError("broken character", f"{what} contains half a character") from None
    except (ValueError, TypeError) as error:
        raise BadRecordError("bad JSON inside", f"{what} cannot be written as JSON: {error}") from None
    return text


def unknown(what: str, given: object, known: Sequence[str], other_names: Mapping[str, str] | None = None) -> str:
    """Describe a value that is not one of `known`, with a suggestion; `other_names` maps what others call them.

    >>> unknown("role", "asistant", ["user", "assistant"])
    "an unknown role 'asistant'; did you mean assistant?"
    """
    if given is None:
        return f"no {what}"
    if other_names and (meant := other_names.get(str(given).lower())):
        return f"an unknown {what} {shown(given)}; write it as {meant}"
    suggestion = suggest_word(str(given).lower(), list(known)) or f"known are {', '.join(known)}"
    return f"an unknown {what} {shown(given)}; {suggestion}"


def shown(value: object, limit: int = 60) -> str:
    """Format a value for a message: containers by kind, all else shortened to `limit` characters."""
    names = {dict: "an object", list: "an empty list" if value == [] else "a list", type(None): "nothing"}
    text = names.get(type(value)) or repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
