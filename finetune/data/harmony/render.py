"""Render a record for training or as a prompt: its messages become tokens, each with a loss weight.

In every render the model is given everything up to and including `<|start|>assistant` and writes the rest of its turn
itself. That rest is trained with its channels' weights (`data.loss`):

    <|channel|>analysis<|message|>THINKING<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>

or, without thinking, `<|channel|>final<|message|>ANSWER<|return|>`. A tool call ends with `<|call|>`; its result and
the `<|start|>assistant` after it are given to the model, and so are context. End tokens are trained, or the model would
not stop; except the `<|end|>` of an answer that is followed by another turn, where the model itself would have written
`<|return|>`. docs/guide/data.md has every policy where renderers differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from finetune.config.schema import DataConfig
from finetune.data.checks import BadRecordError
from finetune.data.conversation import Message
from finetune.data.harmony.encode import (
    HEADER,
    Channel,
    EncodedMessage,
    encode_conversation,
    encode_message,
    encode_text,
    header_ids,
)
from finetune.data.harmony.tokenizer import END_ID, END_OF_TEXT_ID, RETURN_ID
from finetune.data.sources import Record
from finetune.errors import InputError

_NUM_GIVEN = 2
"""Tokens of `<|start|>assistant`, which the caller of the model writes."""


@dataclass(frozen=True, eq=False)
class Example:
    """A record, or one turn of it, as tokens with loss weights.

    Attributes:
        ids: int32 [T], token ids.
        weights: float32 [T]; `weights[t]` is the loss weight of predicting `ids[t]` from the tokens before it. The
            first is always 0.
        id: the record's id; `ID#2` for the second of several examples made of a record by `earlier_thinking: split`,
            or by the length of plain text.
        where: the record's `file:line`.
        channels: int8 [T], `Channel` of each token, plus `HEADER` for headers and end tokens. Assistant messages that
            are not trained have their channel too: `weights` says what is trained. Empty if not rendered here.
        num_without_thinking: assistant messages that the loss weights would train, but that are context because their
            thinking was dropped.
        shared: of an answer to compare with others: the tokens at its start, the prompt, that all answers of the record
            have in common. 0 otherwise. All answers of a record are consecutive examples.
        score: of such an answer, as `Answer.score`; otherwise NaN.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    id: str
    where: str
    channels: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    num_without_thinking: int = 0
    shared: int = 0
    score: float = math.nan

    @property
    def num_trained_tokens(self) -> int:
        """Number of tokens with a weight above 0."""
        return int(np.count_nonzero(self.weights))


def render_examples(record: Record, config: DataConfig) -> list[Example]:
    """Render a record for training: one example, or with `earlier_thinking: split` one for each turn to be trained.

    Plain text of more than `max_length` tokens makes several examples too, and a preference record one for each answer,
    best first (with `pairs: best_worst` the first and the last).

    Args:
        record: a conversation that ends with the assistant's answer or tool call, or plain text.
        config: gives date, effort and identity where the record does not, convention, loss weights, policies and, for
            plain text alone, the length.

    Returns:
        At least one example. All weights are 0 where the loss weights leave nothing to train.

    Raises:
        BadRecordError: the convention is the template's, and it cannot write this conversation.
    """
    conversation = record.conversation
    if conversation.text is not None:
        return _numbered(_render_text(record, conversation.text, config.max_length))
    if conversation.answers:
        return _numbered(_render_answers(record, config))
    encoded = encode_conversation(conversation, config)
    messages = conversation.messages
    if config.earlier_thinking != "split":
        return [_render_turns(record, encoded, messages, config)]
    examples = _numbered([_render_turns(record, encoded, messages[: end + 1], config) for end in turn_ends(messages)])
    return [example for example in examples if example.num_trained_tokens] or examples[:1]


def render_example(record: Record, config: DataConfig) -> Example:
    """Render a record as one example; of several turns made examples by `split`, the last.

    Raises:
        BadRecordError: as `render_examples`.
    """
    return render_examples(record, config)[-1]


def render_prompt(record: Record, config: DataConfig) -> list[int]:
    """Render the model's input before its answer, up to and including `<|start|>assistant`.

    Args:
        record: a conversation; the assistant's messages at its end, if there are any, are left out.
        config: as for `render_examples`.

    Returns:
        Token ids. Followed by `render_answer` of the message left out they are `render_example`'s ids.

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
    keeps_thinking = sees_thinking(messages, config, is_training=False)
    visible = _visible(encode_conversation(conversation, config), keeps_thinking)
    return [*(token for message in visible for token in message.ids), *header_ids("assistant")[:_NUM_GIVEN]]


def render_answer(answer: str, thinking: str | None = None) -> list[int]:
    """Render the model's output after a prompt: thinking if given, then the answer, then `<|return|>`.

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
    """Decide which messages keep their thinking.

    The rule at inference: once a turn has ended with an answer and the user has written again, the thinking up to that
    answer is dropped; within a chain of tool calls thinking stays. The template's training render differs: it drops the
    thinking before a tool call as soon as any answer follows, even in the same turn.

    Args:
        messages: up to the end of the turn that is trained, or up to the point where the model continues.
        config: gives the convention and the policy for earlier thinking.
        is_training: whether the last message is the one that the model learns to write, not part of its input.

    Returns:
        One entry per message; those without thinking have one too.
    """
    if config.earlier_thinking == "keep":
        return [True] * len(messages)
    if is_training and config.convention == "template" and config.earlier_thinking == "drop":
        last_answer = max((index for index, message in enumerate(messages) if message.is_answer), default=-1)
        return [
            index > last_answer if message.tool_calls else index == len(messages) - 1
            for index, message in enumerate(messages)
        ]
    answered = messages[: _last_user_index(messages) + 1]
    last_answer = max((index for index, message in enumerate(answered) if message.is_answer), default=-1)
    return [index > last_answer for index in range(len(messages))]


def _last_user_index(messages: Sequence[Message]) -> int:
    return max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)


def _first_user_index(messages: Sequence[Message]) -> int:
    return next((index for index, message in enumerate(messages) if message.role == "user"), -1)


def _visible(encoded: Sequence[EncodedMessage], keeps_thinking: Sequence[bool]) -> list[EncodedMessage]:
    """The first `len(keeps_thinking)` messages, without the thinking that is dropped."""
    return [
        message
        for message in encoded
        if message.index < len(keeps_thinking)
        and (message.channel != Channel.ANALYSIS or keeps_thinking[message.index])
    ]


def _render_answers(record: Record, config: DataConfig) -> list[Example]:
    """Render every answer of a preference record after the same prompt, whose tokens have no weight.

    Of an answer of several turns all are trained unless `loss.turns` is `last`: they are what was preferred.

    Raises:
        BadRecordError: the prompt's tokens depend on the answer, as the template's treatment of thinking can make them.
    """
    conversation = record.conversation
    num_prompt, answers = conversation.num_prompt, conversation.answers
    if config.pairs == "listwise" and len({answer.score for answer in answers}) < len(answers):
        raise BadRecordError("scores tie", "two of its answers have the same score, and data.pairs is listwise")
    if config.pairs == "best_worst" and len(answers) > 2:
        answers = (answers[0], answers[-1])
    prompt = [message for message in encode_conversation(conversation, config) if message.index < num_prompt]
    examples = []
    for answer in answers:
        messages = (*conversation.messages[:num_prompt], *answer.messages)
        encoded = list(prompt)
        for index, message in enumerate(answer.messages, start=num_prompt):
            encoded += encode_message(index, message, config)
        examples.append(replace(_render_turns(record, encoded, messages, config, num_prompt), score=answer.score))
    shared = min(_num_common([example.ids for example in examples]), *(_first_trained(each) for each in examples))
    keeps_thinking = sees_thinking(conversation.messages, config, is_training=True)[:num_prompt]
    if shared < sum(len(message.ids) for message in _visible(prompt, keeps_thinking)):
        reason = "the tokens of the prompt depend on the answer: give the prompt no thinking, or convention: harmony"
        raise BadRecordError("prompts differ", reason)
    return [replace(example, shared=shared) for example in examples]


def _first_trained(example: Example) -> int:
    """Index of the first token with a weight; the number of tokens if there is none."""
    trained = np.flatnonzero(example.weights)
    return int(trained[0]) if len(trained) else len(example.ids)


def _num_common(all_ids: Sequence[NDArray[np.int32]]) -> int:
    """How many tokens all sequences begin with."""
    length = min(map(len, all_ids))
    differ = np.zeros(length, dtype=bool)
    for ids in all_ids[1:]:
        differ |= ids[:length] != all_ids[0][:length]
    return int(np.argmax(differ)) if differ.any() else length


def _render_turns(
    record: Record,
    encoded: Sequence[EncodedMessage],
    messages: Sequence[Message],
    config: DataConfig,
    num_prompt: int = 0,
) -> Example:
    """Join the encoded messages of the conversation up to the end of `messages`, and weight their tokens.

    With `num_prompt` only what follows that many messages is trained.
    """
    keeps_thinking = sees_thinking(messages, config, is_training=True)
    visible = _visible(encoded, keeps_thinking)
    if visible[-1].channel == Channel.FINAL:
        visible[-1] = replace(visible[-1], end=RETURN_ID)
    all_turns = _trains_all_turns(messages, config)
    first_trained = _first_user_index(messages) if all_turns else _last_user_index(messages)
    if num_prompt:
        first_trained = num_prompt - 1 if config.loss.turns != "last" else max(num_prompt - 1, first_trained)
    with_thinking = {message.index for message in encoded if message.channel == Channel.ANALYSIS}
    lost_thinking = {index for index in with_thinking if index < len(messages) and not keeps_thinking[index]}
    weight_of = _weights_by_channel(config)
    ids = [token for message in visible for token in message.ids]
    weights = np.zeros(len(ids), dtype=np.float32)
    channels = np.empty(len(ids), dtype=np.int8)
    begin, model_continues, without_thinking = 0, False, set()
    for message in visible:
        text = begin + len(message.header)
        end = text + len(message.text)
        channels[begin : end + 1] = message.channel + HEADER
        channels[text:end] = message.channel
        weight = weight_of[message.channel] if message.index > first_trained else 0.0
        if weight and (factor := messages[message.index].weight) is not None:
            weight *= factor
        if weight and message.index in lost_thinking:
            without_thinking.add(message.index)
        elif weight:
            another_turn_follows = message.channel == Channel.FINAL and message.end == END_ID
            weights[begin + (0 if model_continues else _NUM_GIVEN) : end + (not another_turn_follows)] = weight
        model_continues = message.channel != Channel.CONTEXT and message.end == END_ID
        begin = end + 1
    tokens = np.array(ids, dtype=np.int32)
    return Example(tokens, weights, record.id, record.where, channels, len(without_thinking))


def _trains_all_turns(messages: Sequence[Message], config: DataConfig) -> bool:
    """Whether every turn of these messages is trained; weights in a record say so unless the recipe says `last`."""
    if config.earlier_thinking == "split":
        return False
    weighted = config.loss.turns == "auto" and any(message.weight is not None for message in messages)
    return config.loss.turns == "all" or weighted


def _weights_by_channel(config: DataConfig) -> dict[Channel, float]:
    loss = config.loss
    return {
        Channel.CONTEXT: 0.0,
        Channel.ANALYSIS: loss.analysis,
        Channel.COMMENTARY: loss.commentary,
        Channel.TOOL_CALL: loss.tool_call,
        Channel.FINAL: loss.final,
    }


def _render_text(record: Record, text: str, max_length: int) -> list[Example]:
    """Train every token of plain text once, except the first, which nothing precedes; `<|endoftext|>` ends the text.

    A text longer than `max_length` becomes several examples, each beginning with the last token of the one before.
    """
    ids = np.array([*encode_text(text), END_OF_TEXT_ID], dtype=np.int32)
    step = max(1, max_length - 1)
    examples = []
    for begin in range(0, len(ids) - 1, step):
        part = ids[begin : begin + step + 1]
        weights = np.ones(len(part), dtype=np.float32)
        weights[0] = 0.0
        channels = np.where(part == END_OF_TEXT_ID, Channel.TEXT + HEADER, Channel.TEXT).astype(np.int8)
        examples.append(Example(part, weights, record.id, record.where, channels))
    return examples


def _numbered(examples: list[Example]) -> list[Example]:
    if len(examples) == 1:
        return examples
    return [replace(example, id=f"{example.id}#{number}") for number, example in enumerate(examples, start=1)]
