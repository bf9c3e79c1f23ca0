"""Turn a conversation into harmony tokens, each with a loss weight; the official openai-harmony does the rendering.

What is trained: in every render, the model is handed everything up to and including `<|start|>assistant` and writes
the rest of the last turn itself, so exactly that rest has weight 1:

    <|channel|>analysis<|message|>THINKING<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>

or, without thinking, `<|channel|>final<|message|>ANSWER<|return|>`. End tokens are trained, or the model would not
stop. Everything before has weight 0.

Policies, where renderers differ:
- Earlier turns keep their answers and lose their thinking, as they do when the model is used. openai-harmony's own
  dropping (`auto_drop_analysis`) is off, since it would also drop the last turn's, which is to be learned.
- The date in the system message is the recipe's, never today's.
- Text that looks like a control token is encoded as text.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from openai_harmony import (
    Conversation,
    DeveloperContent,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
)
from openai_harmony import Message as HarmonyMessage

from finetune.config.schema import DataConfig
from finetune.data.conversation import Message
from finetune.data.sources import Record
from finetune.data.tokenizer import START_ID, harmony_encoding

KEEP_ANALYSIS = RenderConversationConfig(auto_drop_analysis=False)


class Channel(enum.IntEnum):
    """What a token is part of: `sample.channels % HEADER`. All but CONTEXT are written by the assistant."""

    CONTEXT = 0
    ANALYSIS = 1
    COMMENTARY = 2
    TOOL_CALL = 3
    FINAL = 4
    TEXT = 5  # plain text, without harmony's headers


HEADER = 16
"""Added to a token's channel where it is no content: from `<|start|>` to `<|message|>`, and the end token."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation, or one turn of it, as tokens.

    Attributes:
        ids: int32 [T], token ids.
        weights: float32 [T]; `weights[t]` is the loss weight of predicting `ids[t]` from what precedes it. The first
            is always 0.
        id: the record's id; `ID#2` for the second turn of a record that `earlier_thinking: split` made several of.
        where: the record's `file:line`.
        channels: int8 [T], `Channel` of each token, plus `HEADER` for headers and end tokens. Assistant messages that
            are not trained have their channel too: what is trained, `weights` says. Empty if not rendered here.
        num_control_spellings: how often the record's texts spell a control token, such as `<|end|>`; they stay text.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    id: str
    where: str
    channels: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    num_control_spellings: int = 0

    @property
    def num_trained_tokens(self) -> int:
        """How many tokens have a weight above 0."""
        return int(np.count_nonzero(self.weights))


def render_samples(record: Record, config: DataConfig) -> list[Sample]:
    """Render a record for training: one sample, or with `earlier_thinking: split` one for each turn to be trained.

    Args:
        record: a conversation that ends with the assistant's answer or tool call, or plain text.
        config: gives date, effort and identity where the record does not, convention, loss weights and policies.

    Returns:
        At least one sample. All weights are 0 where the loss weights leave nothing to train.
    """
    return [render_sample(record, config)]


def render_sample(record: Record, config: DataConfig) -> Sample:
    """Render a record for training.

    Args:
        record: a conversation that ends with the assistant's answer.
        config: gives the conversation date and the reasoning effort.

    Returns:
        Its tokens and weights; the module's text says which tokens are trained.
    """
    conversation = _conversation(record.messages, config)
    ids = harmony_encoding().render_conversation_for_training(conversation, KEEP_ANALYSIS)
    tokens = np.array(ids, dtype=np.int32)
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[_prompt_length(tokens, num_trained_messages=2 if record.messages[-1].thinking else 1) :] = 1.0
    return Sample(tokens, weights, record.id, record.where)


def render_prompt(record: Record, config: DataConfig) -> list[int]:
    """Render what the model is given before it answers, up to and including `<|start|>assistant`.

    Args:
        record: a conversation; the assistant's message at its end, if there is one, is left out.
        config: gives the conversation date and the reasoning effort.

    Returns:
        Token ids. With `render_answer` of the message left out they are `render_sample`'s ids.
    """
    messages = record.messages
    if messages[-1].role == "assistant":
        messages = messages[:-1]
    conversation = _conversation(messages, config)
    return list(harmony_encoding().render_conversation_for_completion(conversation, Role.ASSISTANT, KEEP_ANALYSIS))


def render_answer(answer: str, thinking: str | None = None) -> list[int]:
    """Render what the model writes after a prompt: thinking if given, then the answer, then `<|return|>`.

    Args:
        answer: text of the final channel.
        thinking: text of the analysis channel, or None for no such message.

    Returns:
        Token ids that continue `render_prompt`'s.
    """
    conversation = Conversation.from_messages(_harmony_messages(Message("assistant", answer, thinking)))
    ids = harmony_encoding().render_conversation_for_training(conversation, KEEP_ANALYSIS)
    return list(ids[2:])  # without `<|start|>assistant`, which ends the prompt


def _prompt_length(tokens: NDArray[np.int32], num_trained_messages: int) -> int:
    """Where the last turn begins to be the model's own: after `<|start|>assistant` of its first message.

    Text never encodes to `<|start|>`, so counting these from the end finds the message.
    """
    return int(np.flatnonzero(tokens == START_ID)[-num_trained_messages]) + 2


def _conversation(messages: Sequence[Message], config: DataConfig) -> Conversation:
    last = len(messages) - 1
    visible = [message if index == last else replace(message, thinking=None) for index, message in enumerate(messages)]
    rendered = [harmony for message in visible for harmony in _harmony_messages(message)]
    return Conversation.from_messages([_system_message(config.conversation_date, config.reasoning_effort), *rendered])


@functools.cache
def _system_message(conversation_date: str, reasoning_effort: str) -> HarmonyMessage:
    content = (
        SystemContent.new()
        .with_conversation_start_date(conversation_date)
        .with_reasoning_effort(ReasoningEffort[reasoning_effort.upper()])
    )
    return HarmonyMessage.from_role_and_content(Role.SYSTEM, content)


def _harmony_messages(message: Message) -> list[HarmonyMessage]:
    if message.role == "user":
        return [HarmonyMessage.from_role_and_content(Role.USER, message.content)]
    if message.role in ("system", "developer"):
        instructions = DeveloperContent.new().with_instructions(message.content)
        return [HarmonyMessage.from_role_and_content(Role.DEVELOPER, instructions)]
    answer = HarmonyMessage.from_role_and_content(Role.ASSISTANT, message.content).with_channel("final")
    if message.thinking is None:
        return [answer]
    return [HarmonyMessage.from_role_and_content(Role.ASSISTANT, message.thinking).with_channel("analysis"), answer]
