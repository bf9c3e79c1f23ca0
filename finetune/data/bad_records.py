"""Records that cannot be used, as text for the user: counts by kind, places and reasons, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from finetune.data.sources import BadRecord

_KINDS_FIXED = 2
_FORM = "a record holds `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, or `text`"
_TOOLS = "declare each function as {type: function, function: {name, description, parameters}} under `tools`"
_CALLS = "write a call as {id, type: function, function: {name, arguments}}, its arguments as a JSON object"
_ORDER = (
    "let a conversation begin with at most one system message, let user and assistant take turns, and end it with the "
    "assistant's answer"
)
_SCORES = "write one finite number per answer"
_FIXES = {
    "no messages": _FORM,
    "key of form missing": _FORM,
    "key of another form": "remove the key, or give the record as `messages`",
    "ambiguous form": "set the source's `form`",
    "not an object": "write one JSON object per line, or one array of them",
    "not a message": "write each message as {role, content}, or each turn of ShareGPT as {from, value}",
    "broken JSON": "write each record as one line of JSON, as json.dumps does",
    "repeated key": "write each key once per object",
    "line too long": "split the record: no line may have more than 64 MiB",
    "not UTF-8": "convert the file: iconv -f latin1 -t utf-8 FILE > OTHER (or whatever encoding it has)",
    "broken character": "remove the half character, which cutting a text between two UTF-16 units leaves",
    "wrong number of cells": "quote cells that contain the delimiter",
    "unknown role": (
        "write each `role` as system, developer, user, assistant or tool: human is user; ai, gpt, bot and model are "
        "assistant (in ShareGPT's `conversations` with `from` and `value` human and gpt are known)"
    ),
    "unknown message key": "rename the key as the reason says, or remove it",
    "key of another role": "remove the key from messages of that role, or put it into the role's own messages",
    "thinking of another role": "thinking belongs to the assistant: remove the key, or correct the role",
    "unknown channel": "write `channel` as analysis, commentary or final, or leave it out",
    "two thinkings": "keep one of the two",
    "thinking in tags": "set data.think_tags=move",
    "rendered harmony": "give the `messages` that were rendered, with `thinking`, `content` and `tool_calls`",
    "system message not first": _ORDER,
    "two answers in a row": f"join the two answers, or remove one; {_ORDER}",
    "no answer": _ORDER,
    "no question": _ORDER,
    "empty content": "remove messages without text, or records whose answer is empty",
    "content is not text": "write `content` as text",
    "bad tools": _TOOLS,
    "undeclared tool": _TOOLS,
    "bad tool call": _CALLS,
    "bad arguments": _CALLS,
    "tool call without result": "let a message of role `tool` with its `tool_call_id` follow each call",
    "orphan tool result": (
        "give each result the `tool_call_id` of a call before it; for calls as <tool_call> text in ShareGPT turns set "
        "the source's `form: hermes`"
    ),
    "bad answer": (
        "write answers as text, or in a recipe rename what is no answer: `columns: {label: answer}` beside the path"
    ),
    "bad id": "write `id` as text or a number, or rename it: `columns: {number: id}` beside the path",
    "too long": "raise data.max_length, or set data.too_long=truncate (drop leaves them out)",
    "nothing to train": "give the record an answer of a channel that data.loss trains",
    "not in the template": "set data.convention=harmony",
    "unknown reasoning effort": "write `reasoning_effort` as low, medium or high",
    "bad conversation date": "write `conversation_date` as 2025-06-28",
    "bad history": "write `history` as a list of [question, answer] pairs, or give `messages`",
    "bad weight": "write `weight` as a number of the assistant's messages alone, 0 for those that are context",
    "bad JSON inside": "write the value as valid JSON, or as an object instead of text",
    "null that may be padding": "store `arguments` as JSON text, or leave out keys without a value",
    "not text": "give text alone: gpt-oss reads and writes nothing else",
    "refusal": "leave such records out, or write the refusal as `content`",
    "too large": "split the record, or write the file without the large column",
    "word too long": "leave out what is no text, such as encoded files",
    "no prompt": "give the prompt under `prompt`, or whole conversations that begin alike",
    "empty prompt": "leave such records out",
    "empty answer": "leave such records out",
    "prompt ends with an answer": "let the prompt end with a user's message or a tool's result",
    "prompts differ": "let all answers of a record follow the same prompt",
    "identical answers": "leave such records out: they prefer nothing",
    "fewer than two answers": "give two answers or more, or read the one as `form: prompt_completion`",
    "answer without score": "write each answer as an object with its text and its `score`",
    "score is not a number": _SCORES,
    "score is not finite": _SCORES,
    "scores do not fit": _SCORES,
    "scores tie": "leave such records out, or set data.pairs=best_worst or all, which take pairs that differ",
    "scores contradict the pair": "swap `chosen` and `rejected`, or correct the scores",
    "label is not boolean": "write `label` as true or false, or rename it: `columns: {answer: label}` beside the path",
}  # fmt: skip
"""Kind -> what to do. The reason beside it says what is wrong with that record."""


def count_kinds(bad_records: Sequence[BadRecord]) -> str:
    """Count bad records by kind, most frequent first, such as `2 unknown role, 1 too long`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in Counter(bad.kind for bad in bad_records).most_common())


def named(bad_records: Sequence[BadRecord], limit: int) -> Iterator[str]:
    """At most `limit` bad records with place and reason, the first of every kind before others; then how many more."""
    first = {bad.kind: number for number, bad in reversed(list(enumerate(bad_records)))}
    numbers = [*sorted(first.values()), *range(len(bad_records))]
    shown = sorted(list(dict.fromkeys(numbers))[:limit])
    yield from (f"{bad_records[number].where}: {bad_records[number].reason}" for number in shown)
    if len(bad_records) > len(shown):
        yield f"and {len(bad_records) - len(shown):,} more"


def fix_for(bad_records: Sequence[BadRecord]) -> str:
    """What to do about the most frequent kinds."""
    kinds = [kind for kind, _ in Counter(bad.kind for bad in bad_records).most_common(_KINDS_FIXED)]
    return "; ".join(dict.fromkeys(map(_fix_of_kind, kinds)))


def _fix_of_kind(kind: str) -> str:
    if kind.endswith(" is not text") and kind not in _FIXES:
        return f"write `{kind.removesuffix(' is not text')}` as text"
    if kind.startswith("empty ") and kind not in _FIXES:
        return f"leave out records whose `{kind.removeprefix('empty ')}` is empty"
    return _FIXES.get(kind, "correct the records as the reasons say")
