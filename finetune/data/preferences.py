"""Read preference records: a prompt and several scored answers to it, checked so that each pair can teach something.

Forms: `preference` (`chosen` and `rejected` after a `prompt`, after ShareGPT `conversations`, or as whole conversations
whose common beginning is the prompt), `ranked` (a prompt and `completions` with scores) and `labelled` (a prompt, a
completion and a boolean `label`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.config.schema import DataForm
from finetune.data.checks import BadRecordError, parse_json, shown
from finetune.data.conversation import Answer, Conversation, DeclaredTools, Message
from finetune.data.parse_messages import parse_messages, parse_tools
from finetune.data.tool_schemas import is_padded
from finetune.errors import ConfigError, InputError
from finetune.files import JsonObject

ReadTurns = Callable[[object], object]
"""Turns ShareGPT turns into messages."""

PREFERENCE_KEYS: dict[DataForm, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "ranked": ("completions",),
    "labelled": ("prompt", "completion", "label"),
}
"""The keys that a record of each of these forms must have."""

PREFERENCE_OPTIONAL_KEYS: dict[DataForm, tuple[str, ...]] = {
    "preference": (
        "prompt", "conversations", "system", "score_chosen", "score_rejected", "chosen_score", "rejected_score",
        "chosen_rating", "rejected_rating",
    ),
    "ranked": ("prompt", "instruction", "conversations", "system", "scores", "ratings"),
    "labelled": ("system",),
}  # fmt: skip
SUPERVISED_FORMS = ("messages", "sharegpt", "hermes", "alpaca", "prompt_completion", "text")
"""The forms that supervised fine-tuning learns from."""
LABELS_ALONE = "no objective learns from labels alone yet (kto): train desirable answers with `form: prompt_completion`"
_NEEDED = (
    "a prompt with a chosen and a rejected answer, or with scored ones",
    "a prompt, a completion and a boolean label, or pairs",
)
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
_TEXT_KEYS = ("response", "content", "completion", "answer", "text", "messages")
_SCORE_KEYS = ("overall_score", "score", "rating", "reward")
_LIKE_LABELS = ("true", "false", "yes", "no", "0", "1", "good", "bad", "desirable", "undesirable")
_FIRST_ROLES = ("user", "human", "system", "developer")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


def preference_form(raw: JsonObject) -> DataForm | None:
    """The preference form that a record has the keys of, or None; a key whose value is null counts as absent."""
    if all(raw.get(key) is not None for key in PREFERENCE_KEYS["preference"]):
        return "preference"
    completions = raw.get("completions")
    if isinstance(completions, list) or (isinstance(completions, str) and completions.lstrip()[:1] == "["):
        return "ranked"
    if all(raw.get(key) is not None for key in PREFERENCE_KEYS["labelled"]) and isinstance(raw["label"], bool):
        return "labelled"
    return None


def check_label(raw: JsonObject) -> None:
    """Refuse a record with a prompt, a completion and a `label` that seems to mean a boolean but is none.

    Read as a prompt and its completion, bad answers would be trained like good ones.

    Raises:
        BadRecordError: it has such a label.
    """
    label = raw.get("label")
    has_keys = all(raw.get(key) is not None for key in PREFERENCE_KEYS["labelled"])
    is_number = isinstance(label, int | float) and label in (-1, 0, 1)  # a column with a null has 1.0 and 0.0
    if has_keys and not isinstance(label, bool) and (is_number or str(label).strip().lower() in _LIKE_LABELS):
        raise BadRecordError(
            "label is not boolean",
            f"`label` must be true or false, not {shown(label)}; if it says nothing about the completion's quality, "
            "set the source's `form: prompt_completion`",
        )


def check_forms(split: str, forms: Mapping[str, int], kind: str, labels: Mapping[str, int] | None = None) -> None:
    """Refuse data that an objective cannot learn from, and name the recipe that can; test data may have any form.

    Args:
        split: for the message.
        forms: how many records came in which form (`SplitStats.forms`).
        kind: the recipe's `objective.kind`.
        labels: how many answers are desirable and undesirable (`SplitStats.labels`).

    Raises:
        ConfigError: some records have a form of another objective.
        InputError: of the training records' labels all are the same.
    """
    fits = {"sft": set(SUPERVISED_FORMS), "kto": {"preference", "labelled"}}.get(kind, {"preference", "ranked"})
    wrong = {form: count for form, count in forms.items() if form not in fits}
    if split == "test" or not wrong:
        if split == "train" and kind == "kto" and len(labels or {}) == 1 and set(forms) == {"labelled"}:
            raise InputError(
                f"data.{split}: every answer is {next(iter(labels or {}))}",
                why="kto learns from what sets desirable answers apart from undesirable ones",
                fix="add records with the other `label`, or train on desirable answers alone with objective: sft",
            )
        return
    form, count = max(wrong.items(), key=lambda item: item[1])
    what = f"data.{split} has {count:,} records of form `{form}`, and objective.kind is {kind}"
    if form not in PREFERENCE_KEYS:
        raise ConfigError(
            what,
            why=f"{kind} compares answers: its data have {_NEEDED[kind == 'kto']}",
            fix="train on these records with a supervised recipe such as legal_20b (objective: sft), or give pairs",
        )
    fixes = {
        "preference": "take a recipe such as preference_20b (`- override /objective: dpo`)",
        "ranked": "take a recipe such as preference_20b (`- override /objective: dpo`); data.pairs says how many pairs",
        "labelled": f"give pairs to preference_20b; {LABELS_ALONE}",
    }
    if kind == "sft":
        why = "supervised fine-tuning would train the rejected answers like the chosen ones"
        fixes["preference"] += "; `form: messages` beside the path reads `messages` alone"
    else:
        why = f"{kind} needs {_NEEDED[kind == 'kto']}"
    raise ConfigError(what, why=why, fix=fixes[form])


def parse_preference(raw: JsonObject, form: DataForm, read_turns: ReadTurns, overrides: JsonObject) -> Conversation:
    """Read a record's prompt and its answers, best first.

    Args:
        raw: the whole record.
        form: `preference`, `ranked` or `labelled`.
        read_turns: reads ShareGPT turns.
        overrides: the record's own settings, as `Conversation` has them.

    Raises:
        BadRecordError: it cannot be used.
    """
    for key in PREFERENCE_KEYS[form]:
        if raw.get(key) is None:
            raise BadRecordError("key of form missing", f"a record of form `{form}` needs `{key}`")
    tools = parse_tools(raw)
    if form == "labelled":
        label = raw["label"]
        if not isinstance(label, bool):
            raise BadRecordError("label is not boolean", f"`label` must be true or false, not {shown(label)}")
        named, scores = {"completion": raw["completion"]}, [float(label)]
    elif form == "preference":
        named, scores = {"chosen": raw["chosen"], "rejected": raw["rejected"]}, [1.0, 0.0]
        _check_pair_scores(raw)
    else:
        named, scores = _ranked_answers(raw)
    prompt = _prompt(raw, read_turns)
    conversations = {name: _messages_of(name, value, prompt, raw, tools, read_turns) for name, value in named.items()}
    num_prompt = _prompt_length(conversations) if prompt is None else _parsed_length(_with_system(raw, prompt))
    _check_different({name: messages[num_prompt:] for name, messages in conversations.items()})
    answers = [
        Answer(messages[num_prompt:], score) for messages, score in zip(conversations.values(), scores, strict=True)
    ]
    answers.sort(key=lambda answer: -answer.score)
    first = next(iter(conversations.values()))[:num_prompt]
    messages = (*first, *answers[0].messages)
    return Conversation(messages, form=form, tools=tools, answers=tuple(answers), num_prompt=num_prompt, **overrides)


def _prompt(raw: JsonObject, read_turns: ReadTurns) -> list[Any] | None:
    """The messages of the record's own prompt; None if `chosen` and `rejected` are whole conversations.

    Raises:
        BadRecordError: it is of the wrong kind, or ends with the assistant.
    """
    key = next((key for key in ("prompt", "instruction", "conversations") if raw.get(key) is not None), None)
    value = _decoded(raw[key]) if key else None
    if key is None or _is_whole_conversation(_decoded(raw.get("chosen"))):
        return None
    prompt = _as_messages(key, value, "user", read_turns)
    if not prompt or (isinstance(value, str) and not value.strip()):
        raise BadRecordError("empty prompt", f"`{key}` is empty")
    if isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant":
        raise BadRecordError(
            "prompt ends with an answer",
            f"`{key}` ends with a message from the assistant: it must end where an answer begins",
        )
    return prompt


def _is_whole_conversation(value: object) -> bool:
    """Whether an answer is a list of messages, or a transcript, that begins before the assistant's turn."""
    if isinstance(value, str):
        return _is_transcript(value)
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) in _FIRST_ROLES


def _messages_of(
    name: str, value: object, prompt: list[Any] | None, raw: JsonObject, tools: DeclaredTools, read_turns: ReadTurns
) -> tuple[Message, ...]:
    """The prompt followed by one answer, checked."""
    value = _decoded(value)
    if value in ("", []) or (isinstance(value, str) and not value.strip()):
        raise BadRecordError("empty answer", f"`{name}` is empty")
    if prompt is None and isinstance(value, str) and not _is_transcript(value):
        raise BadRecordError("no prompt", f"the record has no `prompt`, and `{name}` is no whole conversation")
    answer = _as_messages(name, value, "assistant", read_turns)
    if prompt is not None and any(isinstance(each, Mapping) and each.get("role") == "user" for each in answer[:1]):
        raise BadRecordError("prompts differ", f"`{name}` begins with a user's message, but the record has a prompt")
    last = answer[-1] if isinstance(answer[-1], Mapping) else {}
    calls = last.get("tool_calls") or last.get("function_call")
    if last.get("role") == "assistant" and not calls and not str(last.get("content") or "").strip():
        raise BadRecordError("empty answer", f"`{name}` ends with an empty message")
    try:
        messages = parse_messages(_with_system(raw, [*(prompt or ()), *answer]), tools, padded=is_padded(raw))
        if any(message.weight is not None for message in messages):
            raise BadRecordError("bad weight", "a message has a `weight`, which answers that are compared cannot have")
        return messages
    except BadRecordError as error:
        raise BadRecordError(error.kind, f"`{name}`: {error.reason}") from None


def _prompt_length(conversations: Mapping[str, Sequence[Message]]) -> int:
    """Messages that all conversations begin with, up to where the assistant's turn begins.

    Raises:
        BadRecordError: they differ before the assistant writes, or one is the beginning of another.
    """
    shortest = min(map(len, conversations.values()))
    common = 0
    while common < shortest and len({messages[common] for messages in conversations.values()}) == 1:
        common += 1
    names = " and ".join(f"`{name}`" for name in conversations)
    messages = next(iter(conversations.values()))
    if all(len(each) == common for each in conversations.values()):
        raise BadRecordError("identical answers", f"{names} are the same")
    if common == shortest:
        raise BadRecordError("prompts differ", f"of {names}, one is the beginning of the other")
    roles = {each[common].role for each in conversations.values()}
    if roles != {"assistant"}:
        raise BadRecordError("prompts differ", f"{names} differ in message {common + 1}, which is not the assistant's")
    while common and messages[common - 1].role == "assistant":
        common -= 1
    if not common:
        raise BadRecordError("no prompt", f"{names} have no message in common before the assistant's")
    return common


def _parsed_length(prompt: Sequence[Any]) -> int:
    """How many messages `parse_messages` makes of a prompt: analysis becomes part of the message after it."""
    return sum(
        not (isinstance(each, Mapping) and each.get("channel") == "analysis" and not each.get("tool_calls"))
        for each in prompt
    )


def _check_different(answers: Mapping[str, Sequence[Message]]) -> None:
    """Refuse answers that are equal, or equal but for white space."""
    for fold, kind in ((False, "identical answers"), (True, "answers differ only in white space")):
        seen: dict[object, str] = {}
        for name, messages in answers.items():
            key = tuple(_folded(message) for message in messages) if fold else tuple(messages)
            if key in seen:
                reason = "are the same" if not fold else "differ in white space alone"
                raise BadRecordError(kind, f"`{seen[key]}` and `{name}` {reason}")
            seen[key] = name


def _folded(message: Message) -> object:
    calls = tuple((call.recipient, " ".join(call.arguments.split())) for call in message.tool_calls)
    return message.role, " ".join(message.content.split()), " ".join((message.thinking or "").split()), calls


def _check_pair_scores(raw: JsonObject) -> None:
    """Refuse scores of a pair that tie or contradict it."""
    for chosen, rejected in _PAIR_SCORES:
        if raw.get(chosen) is not None and raw.get(rejected) is not None:
            better, worse = _score(chosen, raw[chosen]), _score(rejected, raw[rejected])
            if better == worse:
                raise BadRecordError("scores tie", f"`{chosen}` and `{rejected}` are both {better:g}")
            if better < worse:
                reason = f"`{rejected}` ({worse:g}) is higher than `{chosen}` ({better:g})"
                raise BadRecordError("scores contradict the pair", reason)


def _ranked_answers(raw: JsonObject) -> tuple[dict[str, object], list[float]]:
    """The completions by name, and their scores, which are inside them or in a list beside them."""
    entries = _decoded(raw["completions"])
    if not isinstance(entries, list) or len(entries) < 2:
        raise BadRecordError("fewer than two answers", "`completions` must be a list of at least two answers")
    beside = _decoded(raw.get("scores", raw.get("ratings")))
    if beside is not None and (not isinstance(beside, list) or len(beside) != len(entries)):
        raise BadRecordError("scores do not fit", f"`scores` must be a list of {len(entries)} numbers, one per answer")
    named: dict[str, object] = {}
    scores = []
    for number, entry in enumerate(entries, 1):
        name = f"completion {number}"
        if beside is not None:
            named[name] = _value(name, entry) if isinstance(entry, Mapping) and "role" not in entry else entry
            scores.append(_score(f"the score of {name}", beside[number - 1]))
            continue
        if not isinstance(entry, Mapping):
            raise BadRecordError("answer without score", f"{name} must be an object with a text and a score")
        named[name] = _value(name, entry)
        key = next((key for key in _SCORE_KEYS if entry.get(key) is not None), None)
        if key is None:
            raise BadRecordError("answer without score", f"{name} has no score ({', '.join(_SCORE_KEYS)})")
        scores.append(_score(f"`{key}` of {name}", entry[key]))
    if len(set(scores)) == 1:
        raise BadRecordError("scores tie", f"all {len(scores)} answers have the score {scores[0]:g}")
    return named, scores


def _value(name: str, entry: Mapping[str, Any]) -> object:
    key = next((key for key in _TEXT_KEYS if entry.get(key) is not None), None)
    if key is None:
        raise BadRecordError("empty answer", f"{name} has no text ({', '.join(_TEXT_KEYS)})")
    return entry[key]


def _score(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecordError("score is not a number", f"{name} must be a number, not {shown(value)}")
    if not math.isfinite(value):
        raise BadRecordError("score is not finite", f"{name} is {value}")
    return float(value)


def _as_messages(key: str, value: object, role: str, read_turns: ReadTurns) -> list[Any]:
    if isinstance(value, str):
        return _transcript(value) if _is_transcript(value) else [{"role": role, "content": value}]
    turns = [value] if isinstance(value, Mapping) else value
    if isinstance(turns, list):
        if any(isinstance(turn, Mapping) and "from" in turn for turn in turns):
            turns = read_turns(turns)
        if isinstance(turns, list):
            return turns
    raise BadRecordError(f"{key} is not text", f"`{key}` must be text or a list of messages, not {shown(value)}")


def _is_transcript(text: str) -> bool:
    """Whether it is a transcript of turns marked `Human:` and `Assistant:`, as HH-RLHF has."""
    return text.startswith("\n\nHuman:")


def _transcript(text: str) -> list[JsonObject]:
    """The messages of a transcript; an empty last turn of the assistant, where an answer follows, is left out."""
    parts = _TRANSCRIPT.split(text)[1:]
    turns: list[JsonObject] = [
        {"role": _TRANSCRIPT_ROLES[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} and len(turns) % 2 == 0 else turns


def _with_system(raw: JsonObject, messages: list[Any]) -> list[Any]:
    system = raw.get("system")
    if not isinstance(system, str | None):
        raise BadRecordError("system is not text", f"`system` must be text, not {shown(system)}")
    first = [{"role": "system", "content": system}] if system else []
    return messages if not first or messages[:1] == first else first + messages


def _decoded(value: object) -> object:
    """A value, decoded if it is a list or an object as JSON text, which is how flat tables store it."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", '["'):
        return parse_json(value, "the list", inside=True)
    return value
