"""Shorten examples that are longer than a sequence: context is cut from the left, trained tokens never."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.data.harmony.render import Example
from finetune.data.harmony.tokenizer import MESSAGE_ID, START_ID, harmony_encoding

_FEWEST_TEXT_TOKENS = 16
_LONGEST_CHARACTER_TOKENS = 4


def truncate(example: Example, max_length: int) -> Example | None:
    """Cut an example's context from the left until it fits.

    Everything from the first message with a trained token on is kept as it is. Before it, system and developer messages
    stay where they fit (the developer's goes first); of the other messages the most that fit are kept, from a user
    message on, so that no tool result or answer remains without the message it belongs to. If not even the last user
    message fits, the text of the message at the cut loses its beginning and keeps its header.

    Args:
        example: of any length.
        max_length: the most tokens that may remain.

    Returns:
        The example itself if it fits; None if its trained part does not, or if it has no message to cut.
    """
    if len(example.ids) <= max_length:
        return example
    starts = np.flatnonzero(example.ids == START_ID)
    trained = np.flatnonzero(example.weights)
    if not len(starts) or not len(trained) or starts[0] != 0:
        return None
    first = int(np.searchsorted(starts, trained[0], side="right")) - 1
    bounds = [*starts.tolist(), len(example.ids)]
    messages = [range(bounds[number], bounds[number + 1]) for number in range(first)]
    room = max_length - (len(example.ids) - bounds[first])
    if room < 0:
        return None
    pinned: list[range] = []
    num_instructions = sum(_role(example.ids, message) in ("system", "developer") for message in messages[:2])
    for message in messages[:num_instructions]:
        if len(message) <= room:
            pinned.append(message)
            room -= len(message)
    kept = _last_messages(example.ids, messages[num_instructions:], room)
    spans = [*pinned, *kept, range(bounds[first], bounds[-1])]
    indices = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    weights = example.weights[indices].copy()
    weights[0] = 0.0
    return dataclasses.replace(example, ids=example.ids[indices], weights=weights, channels=example.channels[indices])


def group_length(examples: Sequence[Example]) -> int:
    """Tokens of a record's answers side by side in one sequence, with what they share once."""
    return examples[0].shared + sum(len(example.ids) - example.shared for example in examples)


def truncate_group(examples: Sequence[Example], max_length: int) -> list[Example] | None:
    """Cut what the answers of a record share, as `truncate` does, until all of them fit side by side.

    Args:
        examples: the answers of one record. None is cut, whatever its weights.
        max_length: the most tokens that may remain, what is shared counting once.

    Returns:
        The answers, all with the same shortened beginning; None if they do not fit even so.
    """
    shared = examples[0].shared
    ids = np.concatenate([examples[0].ids[:shared], *(example.ids[shared:] for example in examples)])
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[shared] = 1.0
    channels = np.zeros(len(ids), dtype=np.int8)
    channels[:shared] = examples[0].channels[:shared]
    packed = dataclasses.replace(examples[0], ids=ids, weights=weights, channels=channels)
    short = truncate(packed, max_length)
    if short is None:
        return None
    kept = shared - (len(ids) - len(short.ids))
    return [
        dataclasses.replace(
            example,
            ids=np.concatenate([short.ids[:kept], example.ids[shared:]]),
            weights=np.concatenate([np.zeros(kept, dtype=np.float32), example.weights[shared:]]),
            channels=np.concatenate([short.channels[:kept], example.channels[shared:]]),
            shared=kept,
        )
        for example in examples
    ]


def _last_messages(ids: NDArray[np.int32], messages: Sequence[range], room: int) -> list[range]:
    """The spans of the last messages that fit into `room` tokens."""
    sizes = np.cumsum([len(message) for message in reversed(messages)])[::-1]
    for number, message in enumerate(messages):
        if sizes[number] <= room and _role(ids, message) == "user":
            return list(messages[number:])
    kept: list[range] = []
    for message in reversed(messages):
        if len(message) > room:
            return [*_without_beginning(ids, message, room), *kept]
        kept.insert(0, message)
        room -= len(message)
    return kept


def _without_beginning(ids: NDArray[np.int32], message: range, room: int) -> list[range]:
    """A message's header and as much of the end of its text as fits, from a whole character on; or nothing."""
    text_start = message.start + int(np.argmax(ids[message.start : message.stop] == MESSAGE_ID)) + 1
    cut = message.stop - (room - (text_start - message.start))
    if message.stop - cut < _FEWEST_TEXT_TOKENS or text_start > cut:
        return []
    for start in range(cut, cut + _LONGEST_CHARACTER_TOKENS):
        try:
            harmony_encoding().decode_utf8(ids[start : message.stop].tolist())
        except Exception:  # openai-harmony's error for tokens that are no whole characters
            continue
        return [range(message.start, text_start), range(start, message.stop)]
    return []


def _role(ids: NDArray[np.int32], message: range) -> str:
    return harmony_encoding().decode([int(ids[message.start + 1])])
