"""Text that another template or channel would read as control: found and counted, and thinking moved out of its tags.

None of it ever becomes a control token. It is trained as written, which is seldom meant: a model that learned
`<think>` inside its answers writes its thinking to the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from finetune.config.schema import ThinkTags
from finetune.data.checks import BadRecordError
from finetune.data.conversation import FUNCTIONS, Conversation, Message
from finetune.log import printable

ControlKind = Literal["think_tags", "other_think_tags", "harmony", "template", "tool_calls", "headings"]

_WHAT: dict[ControlKind, tuple[str, str]] = {
    "think_tags": (
        "an answer that begins with thinking in tags",
        "it is trained as part of the answer; data.think_tags=move makes it the message's `thinking`, "
        "data.think_tags=refuse refuses such records",
    ),
    "other_think_tags": (
        "thinking tags inside a text",
        "they are trained as they are; give thinking under `thinking` and text without tags",
    ),
    "harmony": (
        "text that spells control tokens of harmony",
        "they stay text; if they are meant as such, the file holds rendered text: give `messages` with `thinking`, "
        "`content` and `tool_calls`",
    ),
    "template": (
        "text that spells another model's template",
        "it is trained as text; give the conversation as `messages`, before any template was applied",
    ),
    "tool_calls": (
        "tool calls or results as text",
        "they are trained as text, not as calls; give calls under `tool_calls` and results as messages of role `tool`, "
        "or set the source's `form: hermes` for ShareGPT turns with <tool_call>",
    ),
    "headings": (
        "the headings of a prompt template inside a text",
        "they are trained as text; give the turns as `messages`, or as `prompt` and `completion`",
    ),
}
"""Kind -> what records do, and what that means and what to do about it."""

_NAMES = r"think|thinking|thoughts?|reasoning|reflection|scratchpad|seed:think"
_OPENING = re.compile(rf"\s*(?:<({_NAMES})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>)", re.IGNORECASE)
_CLOSING_ALONE = re.compile(r"</think>|\[/THINK\]|◁/think▷")  # the opening tag is often part of the prompt
_THINK_TAG = re.compile(
    rf"</?(?:{_NAMES})>|\[/?THINK\]|◁/?think▷|<\|(?:begin|end)_of_(?:thought|solution)\|>", re.IGNORECASE
)
_SOLUTION = re.compile(r"\s*<\|begin_of_solution\|>(.*)<\|end_of_solution\|>\s*", re.DOTALL)

_HARMONY_NAMES = "start|end|message|channel|constrain|return|call|startoftext|endoftext|endofprompt|reserved_[0-9]+"
_HARMONY = re.compile(rf"<\|(?:{_HARMONY_NAMES})\|>")
_HARMONY_MESSAGE = re.compile(
    r"\s*(?:<\|start\|>[^<|]{1,80}(?:<\|channel\|>[^<|]{1,80})?|<\|channel\|>[^<|]{1,80})"
    r"(?:<\|constrain\|>[^<|]{1,40})?<\|message\|>"
)
_TEMPLATE = re.compile(
    rf"<\|(?!(?:{_HARMONY_NAMES}|(?:begin|end)_of_(?:thought|solution))\|>)/?[A-Za-z]\w{{0,40}}\|>"  # ChatML, Llama 3
    r"|<\|(?:turn|channel|tool|tool_call|tool_response|think)>|<(?:turn|channel|tool|tool_call|tool_response)\|>"
    r"|<｜[^｜<>\n]{1,40}｜>"  # DeepSeek, with full-width bars
    r"|\[/?INST\]|<</?SYS>>|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS)\]|\[gMASK\]"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|sop)>"
)
_TOOLS = re.compile(
    r"</?(?:tool_calls?|tool_responses?|function_calls?|function_responses?|functioncall)>"
    r"|<function=[\w.-]{1,64}>|<invoke name=|\[/?TOOL_(?:CALLS|RESULTS)\]"
)
_QUESTION = re.compile(r"^(?:#{1,4} *(?:Human|User|Instruction|Input|Question)|Human|User) *:|\bUSER:", re.MULTILINE)
_REPLY = re.compile(r"^(?:#{1,4} *(?:Assistant|Response|Answer|Output)|Assistant) *:|\bASSISTANT:", re.MULTILINE)


@dataclass
class ControlText:
    """Records of a split that have control text of one kind.

    Attributes:
        num_records: how many.
        where: the first one's place.
        spelling: what was found there.
    """

    num_records: int
    where: str
    spelling: str


def count_control_text(conversation: Conversation, where: str, counts: dict[str, ControlText]) -> None:
    """Add a record's control text to `counts`, which go by `ControlKind`."""
    found: dict[str, str] = {}
    for kind, spelling in _control_text(conversation):
        found.setdefault(kind, spelling)
    for name, spelling in found.items():
        if name in counts:
            counts[name].num_records += 1
        else:
            counts[name] = ControlText(1, where, printable(spelling.strip()[:60]))


def control_text_lines(counts: Mapping[str, ControlText]) -> Iterator[str]:
    """Each kind as a line: how many records, what was found first and where, and what to do."""
    for kind, (what, advice) in _WHAT.items():
        if (found := counts.get(kind)) is not None:
            unit = "record" if found.num_records == 1 else "records"
            yield f"{found.num_records:,} {unit} with {what}, first {found.spelling} in {found.where}: {advice}"


def _control_text(conversation: Conversation) -> Iterator[tuple[ControlKind, str]]:
    """Yield (kind, spelling) for every kind in every text."""
    declared = {recipient.removeprefix(FUNCTIONS) for recipient in conversation.tools.recipients}
    others = (message for answer in conversation.answers[1:] for message in answer.messages)
    for message in (*conversation.messages, *others):
        if message.role == "assistant":
            if (tag := _thinking_first(message.content)) is not None:
                yield "think_tags", tag
            yield from _first("other_think_tags", _THINK_TAG, message.content if tag is None else "")
            yield from _first("other_think_tags", _THINK_TAG, message.thinking or "")
            if declared and _is_call(message.content, declared):
                yield "tool_calls", message.content
    yield from _first("other_think_tags", _THINK_TAG, conversation.text or "")
    for text in conversation.texts():
        yield from _first("harmony", _HARMONY, text)
        yield from _first("template", _TEMPLATE, text)
        if _has_sentence_marks(text):
            yield "template", "<s>" if "<s>" in text else "</s>"
        yield from _first("tool_calls", _TOOLS, text)
        if (found := _QUESTION.search(text)) and _REPLY.search(text):
            yield "headings", found[0]


def _first(kind: ControlKind, pattern: re.Pattern[str], text: str) -> Iterator[tuple[ControlKind, str]]:
    if ("<" in text or "[" in text or "◁" in text) and (found := pattern.search(text)):
        yield kind, found[0]


def _has_sentence_marks(text: str) -> bool:
    """Whether `<s>` and `</s>` are marks around a text rather than HTML's strikethrough inside one."""
    opening, closing = text.count("<s>"), text.count("</s>")
    whole = text.strip()
    return opening != closing or (opening > 0 and whole.startswith("<s>") and whole.endswith("</s>"))


def _is_call(text: str, declared: set[str]) -> bool:
    """Whether a text is a declared tool's call as JSON."""
    if not text.lstrip().startswith("{") or len(text) > 100_000:
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return "name" in value and isinstance(value["name"], str) and value["name"].removeprefix(FUNCTIONS) in declared


# Thinking in tags


def settle_think_tags(conversation: Conversation, policy: ThinkTags) -> Conversation:
    """Apply `data.think_tags`, and refuse rendered harmony.

    Args:
        conversation: as it was read.
        policy: `keep` leaves tags, `move` makes the text between them the message's thinking, `refuse` raises.

    Raises:
        BadRecordError: an assistant's text or plain text is rendered harmony, `refuse` finds thinking in tags, or
            `move` would leave no answer or meets other thinking.
    """
    _refuse_rendered("the text", conversation.text)
    messages = _settled(conversation.messages, policy)
    answers = tuple(replace(answer, messages=_settled(answer.messages, policy)) for answer in conversation.answers)
    if messages == conversation.messages and answers == conversation.answers:
        return conversation
    return replace(conversation, messages=messages, answers=answers, has_moved_thinking=True)


def _settled(messages: tuple[Message, ...], policy: ThinkTags) -> tuple[Message, ...]:
    return tuple(
        _settled_message(f"message {number}", message, policy) if message.role == "assistant" else message
        for number, message in enumerate(messages, start=1)
    )


def _settled_message(place: str, message: Message, policy: ThinkTags) -> Message:
    _refuse_rendered(f"{place}: `content`", message.content)
    _refuse_rendered(f"{place}: thinking", message.thinking)
    if policy == "keep":
        return message
    if policy == "refuse":
        if (tag := _thinking_first(message.content)) is not None:
            raise BadRecordError(
                "thinking in tags", f"{place} begins with {tag}: give it as `thinking`, or set data.think_tags=move"
            )
        return message
    thinking = message.thinking
    if thinking is not None and (inner := split_thinking(thinking)) is not None and not inner[1]:
        thinking = inner[0] or None  # the field was filled with its tags
    if (split := split_thinking(message.content)) is None:
        return replace(message, thinking=thinking)
    moved, content = split
    if moved and thinking is not None and thinking.strip() != moved:
        raise BadRecordError("two thinkings", f"{place} has thinking in its tags and other thinking beside them")
    if not content and not message.tool_calls:
        raise BadRecordError("empty content", f"{place} has nothing behind its thinking in tags")
    return replace(message, content=content, thinking=thinking or moved or None)


def split_thinking(text: str) -> tuple[str, str] | None:
    """Cut an answer that begins with thinking in tags into (thinking, answer); None if it does not, or has no end.

    >>> split_thinking("<think>Two and two.</think> 4")
    ('Two and two.', '4')
    """
    opening = _OPENING.match(text)
    if opening is None:
        closing = _CLOSING_ALONE.search(text)
        begin = 0
    else:
        begin, tag = opening.end(), opening[0].strip()
        wanted = tag.replace("begin", "end") if tag.startswith("<|") else f"{tag[0]}/{tag[1:]}"
        closing = re.compile(re.escape(wanted), re.IGNORECASE).search(text, begin)
    if closing is None:
        return None
    answer = text[closing.end() :]
    if solution := _SOLUTION.fullmatch(answer):
        answer = solution[1]
    return text[begin : closing.start()].strip(), answer.strip()


def _thinking_first(text: str) -> str | None:
    """The tag of an answer that `split_thinking` cuts, or None."""
    if split_thinking(text) is None:
        return None
    opening = _OPENING.match(text) or _CLOSING_ALONE.search(text)
    return opening[0].strip() if opening else None


def _refuse_rendered(place: str, text: str | None) -> None:
    """Refuse a text that begins like a harmony message: its control tokens would be trained as text."""
    if text and "<|message|>" in text and (found := _HARMONY_MESSAGE.match(text)):
        raise BadRecordError(
            "rendered harmony",
            f"{place} begins with {found[0].strip()[:60]}: it is rendered already, and its control tokens would be "
            "trained as text; give `messages` with `thinking`, `content` and `tool_calls` instead",
        )
