"""What a token is part of."""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from openai_harmony import DeveloperContent, ReasoningEffort, RenderOptions, Role, SystemContent, ToolDescription
from openai_harmony import Message as HarmonyMessage

from finetune.config.schema import DataConfig
from finetune.data.forms import Conversation
from finetune.data.harmony import template
from finetune.data.harmony.tokenizer import (
    CALL_ID,
    CHANNEL_ID,
    CONSTRAIN_ID,
    END_ID,
    MESSAGE_ID,
    START_ID,
    harmony_encoding,
)
from finetune.data.message import BadRecordError, Message
from finetune.data.parse_messages import DeclaredTools


class Channel(enum.IntEnum):
    """What a token is part of: `sample.channels % HEADER`. All but CONTEXT and TEXT are written by the assistant."""

    CONTEXT = 0
    ANALYSIS = 1
    COMMENTARY = 2
    TOOL_CALL = 3
    FINAL = 4
    TEXT = 5  # plain text, without harmony's headers


HEADER = 16
"""Added to a token's channel where it is no content: from `<|start|>` to `<|message|>`, and the end token."""


# The harmony messages that a conversation becomes, as tokens: a header, a text and an end each.
#
# The system and developer messages are rendered by openai-harmony; the others are put together here, from control
# tokens and texts that openai-harmony encodes, since its own `render` spends about 70 us a message beside the encoding.
# They are the same tokens (tests/data/test_fuzz_render.py).

HARMONY_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
BEFORE_FIRST = -1
"""Index of the message that the system part, and a developer part without instructions, belong to."""


@dataclass(frozen=True, eq=False)
class Part:
    """One harmony message.

    Attributes:
        kind: what it is to the loss.
        header: tokens from `<|start|>` to `<|message|>`.
        text: tokens between header and end.
        end: `<|end|>`, `<|call|>` or `<|return|>`.
        message: index of the conversation's message that it comes from, or BEFORE_FIRST.
    """

    kind: Channel
    header: tuple[int, ...]
    text: Sequence[int]
    end: int
    message: int


def encode_text(text: str) -> list[int]:
    """Encode text; what looks like a control token stays text."""
    return harmony_encoding().encode(text, disallowed_special=())


@functools.lru_cache(maxsize=4096)
def header_ids(author: str, channel: str | None = None, content_type: str | None = None) -> tuple[int, ...]:
    """Tokens from `<|start|>` to `<|message|>`.

    Args:
        author: role or tool, with ` to=RECIPIENT` if there is one.
        channel: written after `<|channel|>`; None for none.
        content_type: written after the channel; `<|constrain|>` at its start is the control token.
    """
    ids = [START_ID, *encode_text(author)]
    if channel is not None:
        ids.append(CHANNEL_ID)
        if content_type is None:
            ids += encode_text(channel)
        elif content_type.startswith("<|constrain|>"):
            ids += [*encode_text(channel), *encode_text(" "), CONSTRAIN_ID]
            ids += encode_text(content_type.removeprefix("<|constrain|>"))
        else:
            ids += encode_text(f"{channel} {content_type}")
    return (*ids, MESSAGE_ID)


def opening_parts(conversation: Conversation, config: DataConfig) -> list[Part]:
    """The system message, and the developer's if there are instructions or functions."""
    tools = conversation.tools
    system = _system_ids(
        conversation.conversation_date or config.conversation_date,
        conversation.reasoning_effort or config.reasoning_effort,
        conversation.model_identity or config.model_identity or HARMONY_IDENTITY,
        tools.builtin,
        bool(tools.functions),
    )
    parts = [_context(system, BEFORE_FIRST)]
    first = conversation.messages[0]
    instructions = first.content if first.role in ("system", "developer") else None
    if instructions is not None or tools.functions:
        ids = _template_developer_ids if config.convention == "template" else _developer_ids
        parts.append(_context(ids(instructions, tools), BEFORE_FIRST if instructions is None else 0))
    return parts


def message_parts(index: int, message: Message, config: DataConfig) -> Iterator[Part]:
    """A message's parts, thinking first; none for the instructions, which belong to the opening.

    Raises:
        BadRecordError: the convention is the template's and it cannot write this message.
    """
    if config.convention == "template":
        message = template.as_template_writes(index, message)
    if message.role == "user":
        yield _text_part(Channel.CONTEXT, header_ids("user"), message.content, index)
    elif message.role == "tool":
        header = header_ids(f"{message.recipient} to=assistant", _channel_of(message.recipient or ""))
        yield _text_part(Channel.CONTEXT, header, message.content, index)
    elif message.role == "assistant":
        yield from _assistant_parts(index, message, config)


def _assistant_parts(index: int, message: Message, config: DataConfig) -> Iterator[Part]:
    if message.thinking is not None:
        yield _text_part(Channel.ANALYSIS, header_ids("assistant", "analysis"), message.thinking, index)
    if message.content:
        kind = Channel.FINAL if message.channel == "final" else Channel.COMMENTARY
        yield _text_part(kind, header_ids("assistant", message.channel), message.content, index)
    for call in message.tool_calls:
        content_type = "code" if call.is_builtin else "json"
        if not call.is_builtin and writes_constrain(config):
            content_type = "<|constrain|>json"
        header = header_ids(f"assistant to={call.recipient}", _channel_of(call.recipient), content_type)
        yield replace(_text_part(Channel.TOOL_CALL, header, call.arguments, index), end=CALL_ID)


def writes_constrain(config: DataConfig) -> bool:
    """Whether calls of functions are marked `<|constrain|>json`, as the format's documents do, or ` json`."""
    if config.tool_call_type == "auto":
        return config.convention == "harmony"
    return config.tool_call_type == "constrain"


def _channel_of(recipient: str) -> str:
    """Functions are called, and answer, in commentary; the builtin tools in analysis."""
    return "commentary" if recipient.startswith("functions.") else "analysis"


def _text_part(kind: Channel, header: tuple[int, ...], text: str, index: int) -> Part:
    return Part(kind, header, encode_text(text), END_ID, index)


def _context(ids: tuple[int, ...], index: int) -> Part:
    begin = ids.index(MESSAGE_ID) + 1
    return Part(Channel.CONTEXT, ids[:begin], ids[begin:-1], ids[-1], index)


@functools.lru_cache(maxsize=128)
def _system_ids(
    conversation_date: str, effort: str, identity: str, builtin: tuple[str, ...], has_functions: bool
) -> tuple[int, ...]:
    content = (
        SystemContent.new()
        .with_model_identity(identity)
        .with_conversation_start_date(conversation_date)
        .with_reasoning_effort(ReasoningEffort[effort.upper()])
    )
    if "browser" in builtin:
        content = content.with_browser_tool()
    if "python" in builtin:
        content = content.with_python_tool()
    message = HarmonyMessage.from_role_and_content(Role.SYSTEM, content)
    options = RenderOptions(conversation_has_function_tools=has_functions)
    return tuple(harmony_encoding().render(message, options))


@functools.lru_cache(maxsize=128)
def _developer_ids(instructions: str | None, tools: DeclaredTools) -> tuple[int, ...]:
    content = DeveloperContent.new()
    if instructions is not None:
        content = content.with_instructions(instructions)
    if tools.functions:
        content = content.with_function_tools(
            [
                ToolDescription.new(tool.name, tool.description, json.loads(tool.schema) if tool.schema else None)
                for tool in tools.functions
            ]
        )
    try:
        return tuple(harmony_encoding().render(HarmonyMessage.from_role_and_content(Role.DEVELOPER, content)))
    except ValueError as error:  # such as a default of 1e400, which is JSON, and no number that it knows
        raise BadRecordError("bad tools", f"openai-harmony cannot write the record's tools: {error}") from None


@functools.lru_cache(maxsize=128)
def _template_developer_ids(instructions: str | None, tools: DeclaredTools) -> tuple[int, ...]:
    return (*header_ids("developer"), *encode_text(template.developer_text(instructions, tools)), END_ID)
