"""Turns of a conversation: where they end, and whose thinking the model still sees."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.config.schema import DataConfig
from finetune.data.message import Message


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
