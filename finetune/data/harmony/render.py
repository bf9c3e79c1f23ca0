"""Turns of a conversation: where they end, and whose thinking the model still sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from finetune.config.schema import DataConfig
from finetune.data.forms import Conversation
from finetune.data.harmony.encode import HEADER as HEADER
from finetune.data.harmony.encode import Channel as Channel
from finetune.data.harmony.encode import Part, encode_text, header_ids, message_parts, opening_parts
from finetune.data.harmony.tokenizer import END_ID, END_OF_TEXT_ID, RETURN_ID
from finetune.data.message import Message
from finetune.data.sources import Record
from finetune.errors import InputError


def last_user_index(messages: Sequence[Message]) -> int:
    """Index of the last message from a user; -1 if there is none."""
    return max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)


def turn_ends(messages: Sequence[Message]) -> list[int]:
    """Index of the last assistant message of every turn; a turn begins with a user's message.

    >>> user, answer = Message("user", "u"), Message("assistant", "a")
    >>> turn_ends([answer, user, answer, user, user, answer])
    [2, 5]
    """
    ends: list[int] = []
    before_turn, in_turn = True, False
    for index, message in enumerate(messages):
        if message.role == "user":
            before_turn, in_turn = False, False
        elif message.role == "assistant" and not before_turn:
            if in_turn:
                ends[-1] = index
            else:
                ends.append(index)
            in_turn = True
    return ends


def sees_thinking(messages: Sequence[Message], config: DataConfig, *, is_training: bool) -> list[bool]:
    """Which messages keep their thinking.

    The rule at inference: once a turn has ended with an answer and the user has spoken again, what was thought up to
    that answer is gone; within a chain of tool calls thinking stays. The template's training render differs: it drops
    the thinking before a tool call as soon as any answer follows, even in the same turn.

    Args:
        messages: up to the end of the turn that is trained, or up to where the model is to go on.
        config: gives the convention and what becomes of earlier thinking.
        is_training: whether the last message is what the model learns to write, rather than what it is given.

    Returns:
        One entry a message; those without thinking have one too.
    """
    if config.earlier_thinking == "keep":
        return [True] * len(messages)
    if is_training and config.convention == "template" and config.earlier_thinking == "drop":
        last_answer = max((index for index, message in enumerate(messages) if message.is_answer), default=-1)
        return [
            index > last_answer if message.tool_calls else index == len(messages) - 1
            for index, message in enumerate(messages)
        ]
    spoken = messages[: last_user_index(messages) + 1]
    last_answer = max((index for index, message in enumerate(spoken) if message.is_answer), default=-1)
    return [index > last_answer for index in range(len(messages))]


# Turn a conversation into harmony tokens, each with a loss weight.
#
# What is trained: in every render, the model is handed everything up to and including `<|start|>assistant` and writes
# the rest of its turn itself, so that rest has its channels' weights (`data.loss`):
#
#     <|channel|>analysis<|message|>THINKING<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>
#
# or, without thinking, `<|channel|>final<|message|>ANSWER<|return|>`. A tool call ends with `<|call|>`; its result and
# the `<|start|>assistant` after it are handed to the model again, and so are context. End tokens are trained, or the
# model would not stop; but not the `<|end|>` of an answer that is followed by another turn, where the model itself
# would have written `<|return|>`. docs/guide/data.md has every policy where renderers differ.

_NUM_GIVEN = 2
"""Tokens of `<|start|>assistant`, which whoever calls the model writes."""


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation, or one turn of it, as tokens.

    Attributes:
        ids: int32 [T], token ids.
        weights: float32 [T]; `weights[t]` is the loss weight of predicting `ids[t]` from what precedes it. The first
            is always 0.
        id: the record's id; `ID#2` for the second of several samples that `earlier_thinking: split`, or the length of
            plain text, made of a record.
        where: the record's `file:line`.
        channels: int8 [T], `Channel` of each token, plus `HEADER` for headers and end tokens. Assistant messages that
            are not trained have their channel too: what is trained, `weights` says. Empty if not rendered here.
        num_control_spellings: how often the record's texts spell a control token, such as `<|end|>`; they stay text.
        num_without_thinking: assistant messages that the loss weights would train, but that are context since their
            thinking was dropped.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    id: str
    where: str
    channels: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    num_control_spellings: int = 0
    num_without_thinking: int = 0

    @property
    def num_trained_tokens(self) -> int:
        """How many tokens have a weight above 0."""
        return int(np.count_nonzero(self.weights))


def render_examples(record: Record, config: DataConfig) -> list[Example]:
    """Render a record for training: one sample, or with `earlier_thinking: split` one for each turn to be trained.

    Plain text of more than `max_length` tokens makes several, too.

    Args:
        record: a conversation that ends with the assistant's answer or tool call, or plain text.
        config: gives date, effort and identity where the record does not, convention, loss weights, policies and, for
            plain text alone, the length.

    Returns:
        At least one sample. All weights are 0 where the loss weights leave nothing to train.

    Raises:
        BadRecordError: the convention is the template's, and it cannot write this conversation.
    """
    conversation = record.conversation
    if conversation.text is not None:
        return _numbered(_plain_text(record, conversation.text, config.max_length))
    parts = _parts(conversation, config)
    messages = conversation.messages
    if config.earlier_thinking != "split":
        return [_sample(record, parts, messages, config)]
    samples = [_sample(record, parts, messages[: end + 1], config) for end in turn_ends(messages)]
    numbered = _numbered(samples)
    return [sample for sample in numbered if sample.num_trained_tokens] or numbered[:1]


def render_example(record: Record, config: DataConfig) -> Example:
    """Render a record that makes one sample; of several turns made samples by `split`, the last.

    Raises:
        BadRecordError: as `render_examples`.
    """
    return render_examples(record, config)[-1]


def render_prompt(record: Record, config: DataConfig) -> list[int]:
    """Render what the model is given before it answers, up to and including `<|start|>assistant`.

    Args:
        record: a conversation; the assistant's messages at its end, if there are any, are left out.
        config: as for `render_examples`.

    Returns:
        Token ids. With `render_answer` of the message left out they are `render_example`'s ids.

    Raises:
        InputError: the record is plain text, which has no prompt.
        BadRecordError: as `render_examples`.
    """
    conversation = record.conversation
    if conversation.text is not None:
        raise InputError(f"{record.where}: plain text has no prompt to answer", fix="evaluate on conversations")
    messages = list(conversation.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    shown = sees_thinking(messages, config, is_training=False)
    ids = [token for part in _shown_parts(_parts(conversation, config), shown) for token in _ids(part)]
    return [*ids, *header_ids("assistant")[:_NUM_GIVEN]]


def render_answer(answer: str, thinking: str | None = None) -> list[int]:
    """Render what the model writes after a prompt: thinking if given, then the answer, then `<|return|>`.

    Args:
        answer: text of the final channel.
        thinking: text of the analysis channel, or None for no such message.

    Returns:
        Token ids that continue `render_prompt`'s.
    """
    ids: list[int] = []
    if thinking is not None:
        ids += [*header_ids("assistant", "analysis"), *encode_text(thinking), END_ID]
    ids += [*header_ids("assistant", "final"), *encode_text(answer), RETURN_ID]
    return ids[_NUM_GIVEN:]


def _parts(conversation: Conversation, config: DataConfig) -> list[Part]:
    parts = opening_parts(conversation, config)
    for index, message in enumerate(conversation.messages):
        parts.extend(message_parts(index, message, config))
    return parts


def _shown_parts(parts: Sequence[Part], shown: Sequence[bool]) -> list[Part]:
    """The parts of the first `len(shown)` messages, without the thinking that is not shown."""
    return [
        part for part in parts if part.message < len(shown) and (part.kind != Channel.ANALYSIS or shown[part.message])
    ]


def _sample(record: Record, parts: Sequence[Part], messages: Sequence[Message], config: DataConfig) -> Example:
    shown = sees_thinking(messages, config, is_training=True)
    visible = _shown_parts(parts, shown)
    if visible[-1].kind == Channel.FINAL:
        visible[-1] = replace(visible[-1], end=RETURN_ID)
    all_turns = config.loss.turns == "all" and config.earlier_thinking != "split"
    first_trained = _first_user_index(messages) if all_turns else last_user_index(messages)
    thought = {part.message for part in parts if part.kind == Channel.ANALYSIS}
    lost = {index for index in thought if index < len(shown) and not shown[index]}
    by_channel = _weights_by_channel(config)
    ids = [token for part in visible for token in _ids(part)]
    weights = np.zeros(len(ids), dtype=np.float32)
    channels = np.empty(len(ids), dtype=np.int8)
    begin, model_goes_on, without_thinking = 0, False, set()
    for part in visible:
        text = begin + len(part.header)
        end = text + len(part.text)
        channels[begin : end + 1] = part.kind + HEADER
        channels[text:end] = part.kind
        weight = by_channel[part.kind] if part.message > first_trained else 0.0
        if weight and part.message in lost:
            without_thinking.add(part.message)
        elif weight:
            answer_ends_elsewhere = part.kind == Channel.FINAL and part.end == END_ID
            weights[begin + (0 if model_goes_on else _NUM_GIVEN) : end + (not answer_ends_elsewhere)] = weight
        model_goes_on = part.kind != Channel.CONTEXT and part.end == END_ID
        begin = end + 1
    spellings = record.conversation.num_control_spellings
    tokens = np.array(ids, dtype=np.int32)
    return Example(tokens, weights, record.id, record.where, channels, spellings, len(without_thinking))


def _plain_text(record: Record, text: str, max_length: int) -> list[Example]:
    """Every token is trained once, but the first, which nothing precedes; `<|endoftext|>` ends the text.

    A longer text than `max_length` becomes several samples, each beginning with the last token of the one before.
    """
    ids = np.array([*encode_text(text), END_OF_TEXT_ID], dtype=np.int32)
    step = max(1, max_length - 1)
    samples = []
    for begin in range(0, len(ids) - 1, step):
        part = ids[begin : begin + step + 1]
        weights = np.ones(len(part), dtype=np.float32)
        weights[0] = 0.0
        channels = np.where(part == END_OF_TEXT_ID, Channel.TEXT + HEADER, Channel.TEXT).astype(np.int8)
        spellings = record.conversation.num_control_spellings
        samples.append(Example(part, weights, record.id, record.where, channels, spellings))
    return samples


def _numbered(samples: list[Example]) -> list[Example]:
    if len(samples) == 1:
        return samples
    return [replace(sample, id=f"{sample.id}#{number}") for number, sample in enumerate(samples, start=1)]


def _weights_by_channel(config: DataConfig) -> dict[Channel, float]:
    loss = config.loss
    return {
        Channel.CONTEXT: 0.0,
        Channel.ANALYSIS: loss.analysis,
        Channel.COMMENTARY: loss.commentary,
        Channel.TOOL_CALL: loss.tool_call,
        Channel.FINAL: loss.final,
    }


def _first_user_index(messages: Sequence[Message]) -> int:
    return next((index for index, message in enumerate(messages) if message.role == "user"), -1)


def _ids(part: Part) -> list[int]:
    return [*part.header, *part.text, part.end]
