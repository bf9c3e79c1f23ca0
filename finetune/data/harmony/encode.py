"""Encode the messages of a conversation: each becomes harmony messages of a header, a text and an end token.

openai-harmony renders the system and developer messages. The other messages are built here from control tokens and
texts that openai-harmony encodes, since its own `render` spends about 70 us per message besides the encoding. They are
the same tokens (tests/data/test_fuzz_render.py).
"""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from openai_harmony import DeveloperContent, ReasoningEffort, RenderOptions, Role, SystemContent, ToolDescription
from openai_harmony import Message as HarmonyMessage

from finetune.config.schema import DataConfig
from finetune.data.checks import BadRecordError
from finetune.data.conversation import FUNCTIONS, Conversation, DeclaredTools, Message
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
from finetune.data.tool_schemas import check_names_are_rendered

HARMONY_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
BEFORE_FIRST = -1
"""Message index of the system message, and of a developer message without instructions."""


class Channel(enum.IntEnum):
    """The part that a token belongs to: `example.channels % HEADER`. The assistant writes all but CONTEXT and TEXT."""

    CONTEXT = 0
    ANALYSIS = 1
    COMMENTARY = 2
    TOOL_CALL = 3
    FINAL = 4
    TEXT = 5  # plain text, without harmony's headers


HEADER = 16
"""Added to a token's channel where it is not content: from `<|start|>` to `<|message|>`, and the end token."""


@dataclass(frozen=True, eq=False)
class EncodedMessage:
    """One harmony message as tokens.

    Attributes:
        channel: decides the loss weight.
        header: tokens from `<|start|>` to `<|message|>`.
        text: tokens between header and end.
        end: `<|end|>`, `<|call|>` or `<|return|>`.
        index: index of the conversation's message that it comes from, or BEFORE_FIRST.
    """

    channel: Channel
    header: tuple[int, ...]
    text: Sequence[int]
    end: int
    index: int

    @property
    def ids(self) -> list[int]:
        """All its tokens."""
        return [*self.header, *self.text, self.end]


def encode_conversation(conversation: Conversation, config: DataConfig) -> list[EncodedMessage]:
    """Encode every message of a conversation, thinking included.

    Raises:
        BadRecordError: the convention is the template's, and it cannot write this conversation.
    """
    encoded = encode_opening(conversation, config)
    for index, message in enumerate(conversation.messages):
        encoded.extend(encode_message(index, message, config))
    return encoded


def encode_opening(conversation: Conversation, config: DataConfig) -> list[EncodedMessage]:
    """Encode the system message, and the developer's if there are instructions or functions."""
    tools = conversation.tools
    system = _system_ids(
        conversation.conversation_date or config.conversation_date,
        conversation.reasoning_effort or config.reasoning_effort,
        conversation.model_identity or config.model_identity or HARMONY_IDENTITY,
        tools.builtin,
        bool(tools.functions),
    )
    encoded = [_context(system, BEFORE_FIRST)]
    first = conversation.messages[0]
    instructions = first.content if first.role in ("system", "developer") else None
    if instructions is not None or tools.functions:
        ids = _template_developer_ids if config.convention == "template" else _developer_ids
        encoded.append(_context(ids(instructions, tools), BEFORE_FIRST if instructions is None else 0))
    return encoded


def encode_message(index: int, message: Message, config: DataConfig) -> Iterator[EncodedMessage]:
    """Encode one message, thinking first; yields nothing for the instructions, which belong to the opening.

    Raises:
        BadRecordError: the convention is the template's, and it cannot write this message.
    """
    if config.convention == "template":
        message = template.to_template_form(index, message)
    if message.role == "user":
        yield _with_text(Channel.CONTEXT, header_ids("user"), message.content, index)
    elif message.role == "tool":
        header = header_ids(f"{message.recipient} to=assistant", _tool_channel(message.recipient or ""))
        yield _with_text(Channel.CONTEXT, header, message.content, index)
    elif message.role == "assistant":
        yield from _encode_assistant(index, message, config)


def _encode_assistant(index: int, message: Message, config: DataConfig) -> Iterator[EncodedMessage]:
    if message.thinking is not None:
        yield _with_text(Channel.ANALYSIS, header_ids("assistant", "analysis"), message.thinking, index)
    if message.content:
        channel = Channel.FINAL if message.channel == "final" else Channel.COMMENTARY
        yield _with_text(channel, header_ids("assistant", message.channel), message.content, index)
    for call in message.tool_calls:
        content_type = "code" if call.is_builtin else "json"
        if not call.is_builtin and writes_constrain(config):
            content_type = "<|constrain|>json"
        header = header_ids(f"assistant to={call.recipient}", _tool_channel(call.recipient), content_type)
        yield replace(_with_text(Channel.TOOL_CALL, header, call.arguments, index), end=CALL_ID)


def encode_text(text: str) -> list[int]:
    """Encode text; control tokens that it spells stay text."""
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


def writes_constrain(config: DataConfig) -> bool:
    """Whether function calls are marked `<|constrain|>json`, as in the format's documentation, or ` json`."""
    if config.tool_call_type == "auto":
        return config.convention == "harmony"
    return config.tool_call_type == "constrain"


def _tool_channel(recipient: str) -> str:
    """Functions are called, and answer, in commentary; the builtin tools in analysis."""
    return "commentary" if recipient.startswith(FUNCTIONS) else "analysis"


def _with_text(channel: Channel, header: tuple[int, ...], text: str, index: int) -> EncodedMessage:
    return EncodedMessage(channel, header, encode_text(text), END_ID, index)


def _context(ids: tuple[int, ...], index: int) -> EncodedMessage:
    begin = ids.index(MESSAGE_ID) + 1
    return EncodedMessage(Channel.CONTEXT, ids[:begin], ids[begin:-1], ids[-1], index)


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


def builtin_tool_text(name: str) -> str:
    """The text that declares the builtin `browser` or `python` in the system message, with the blank line after it."""
    text = harmony_encoding().decode(_system_ids("", "medium", "", (name,), False))
    return text.partition("# Tools\n\n")[2].partition("# Valid channels")[0]


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
        ids = tuple(harmony_encoding().render(HarmonyMessage.from_role_and_content(Role.DEVELOPER, content)))
        _check_names(tools, harmony_encoding().decode(ids))
        return ids
    except ValueError as error:  # such as a default of 1e400, which is JSON, but no number that it accepts
        raise BadRecordError("bad tools", f"openai-harmony cannot write the record's tools: {error}") from None


@functools.lru_cache(maxsize=128)
def _template_developer_ids(instructions: str | None, tools: DeclaredTools) -> tuple[int, ...]:
    text = template.developer_text(instructions, tools)
    _check_names(tools, text)
    return (*header_ids("developer"), *encode_text(text), END_ID)


def _check_names(tools: DeclaredTools, rendered: str) -> None:
    """Raise BadRecordError if a declared parameter is not in the developer message's text."""
    for tool in tools.functions:
        check_names_are_rendered(tool.name, json.loads(tool.schema) if tool.schema else None, rendered)
