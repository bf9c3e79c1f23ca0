"""Text generation: batched, with a KV cache, reproducible by seed whatever else is in the batch.

Shape legend: B unfinished sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from openai_harmony import HarmonyError, Message, Role, StreamableParser, StreamState, TextContent
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune.data.harmony.tokenizer import (
    CALL_ID,
    END_ID,
    END_OF_TEXT_ID,
    FIRST_CONTROL_ID,
    RETURN_ID,
    harmony_encoding,
)
from finetune.model.decoding import Decoder

STOP_IDS = frozenset({RETURN_ID, CALL_ID, END_OF_TEXT_ID})
_MESSAGE_ENDS = frozenset({END_ID, RETURN_ID, CALL_ID})
_CHANNELS = frozenset({"analysis", "commentary", "final"})
OnToken = Callable[[int, int], None]
"""Called with the prompt's number and each new token, in order of generation."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
        max_tokens: maximum number of new tokens.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: choose among the likeliest tokens that together have this probability (nucleus sampling).
        seed: of the random choices; each prompt has a generator of its own.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def generate(
    model: GptOssForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_token: OnToken = lambda number, token: None,
    *,
    numbers: Sequence[int] | None = None,
    is_finished: Callable[[list[int]], bool] = lambda written: False,
) -> list[list[int]]:
    """Continue prompts until each generates a stop token or has `max_tokens` new ones.

    Args:
        model: in evaluation mode.
        prompts: token ids; all are read in one forward pass.
        sampling: see `Sampling`.
        on_token: for streaming.
        numbers: seed each prompt's generator, with `sampling.seed`; equal ones draw alike in any batch. None: 0, 1, ...
        is_finished: whether a prompt's new tokens are enough; asked beside stop tokens and `max_tokens`.

    Returns:
        The new tokens of each prompt, including the stop token.
    """
    decoder = Decoder(model, prompts, sampling.max_tokens)
    draws = range(len(prompts)) if numbers is None else numbers
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + number) for number in draws]
    written: list[list[int]] = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))  # prompt numbers, in the decoder's order
    hidden = decoder.read_prompts()
    while True:
        logits = model.lm_head(hidden).float()
        tokens = choose_tokens(logits, [generators[number] for number in unfinished], sampling)
        for number, token in zip(unfinished, tokens, strict=True):
            written[number].append(token)
            on_token(number, token)
        kept = [
            place
            for place, number in enumerate(unfinished)
            if tokens[place] not in STOP_IDS
            and len(written[number]) < sampling.max_tokens
            and not is_finished(written[number])
        ]
        if not kept:
            return written
        if len(kept) < len(unfinished):
            decoder.keep(kept)
            unfinished = [unfinished[place] for place in kept]
        hidden = decoder.read(torch.tensor([written[number][-1] for number in unfinished]))


def choose_tokens(logits: Tensor, generators: Sequence[torch.Generator], sampling: Sampling) -> list[int]:
    """Choose the next token of each sequence.

    Args:
        logits: float32 [B, V].
        generators: on the CPU, one per sequence.
        sampling: temperature and top_p.
    """
    if sampling.temperature == 0:
        chosen: list[int] = logits.argmax(-1).tolist()
        return chosen
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        # A token is kept while those before it have less than top_p together; the likeliest always is.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ranked)
    rows = probabilities.cpu()
    return [
        int(torch.multinomial(row, 1, generator=generator)) for row, generator in zip(rows, generators, strict=True)
    ]


@dataclass(frozen=True)
class Completion:
    """Generated tokens parsed as harmony.

    Attributes:
        final: text of the final channel, "" if there is none; texts of several messages are joined by an empty line.
        analysis: text of the analysis channel, likewise.
        stopped: it ended with a stop token; otherwise it was cut at `max_tokens`.
        error: its format error, or None. Being cut is not an error.
    """

    final: str
    analysis: str
    stopped: bool
    error: str | None


def read_completion(tokens: Sequence[int], recipients: Collection[str] = ()) -> Completion:
    """Parse generated tokens as harmony messages, and check that harmony allows an assistant to write them.

    openai-harmony's parser refuses little: inside a message it treats any control token but the three end tokens as
    text. The checks beyond it follow https://cookbook.openai.com/articles/openai-harmony: an assistant thinks, calls a
    tool, ending with `<|call|>`, or gives one final answer, ending with `<|return|>`.

    Args:
        tokens: without the prompt, with the stop token.
        recipients: the tools that the conversation declares, as `DeclaredTools.recipients` gives them.
    """
    parser = StreamableParser(harmony_encoding(), role=Role.ASSISTANT)
    stopped = bool(tokens) and tokens[-1] in STOP_IDS
    error = None
    try:
        for token in tokens[:-1] if stopped and tokens[-1] == END_OF_TEXT_ID else tokens:
            if token >= FIRST_CONTROL_ID and token not in _MESSAGE_ENDS and parser.state == StreamState.CONTENT:
                error = error or f"{harmony_encoding().decode([token])} inside a message"
            parser.process(token)
    except HarmonyError as problem:
        error = error or str(problem)
    messages = [_Message.of(message) for message in parser.messages]
    if parser.state == StreamState.CONTENT:
        recipient, channel = parser.current_recipient, parser.current_channel
        messages.append(_Message(parser.current_role == Role.ASSISTANT, channel, recipient, parser.current_content))
    error = error or _message_error(messages, recipients) or (_end_error(messages, tokens[-1]) if stopped else None)
    texts = {name: [one.text for one in messages if one.channel == name] for name in ("final", "analysis")}
    return Completion("\n\n".join(texts["final"]), "\n\n".join(texts["analysis"]), stopped, error)


@dataclass(frozen=True)
class _Message:
    """A message of a completion; the last one may be unfinished."""

    by_assistant: bool
    channel: str | None
    recipient: str | None
    text: str

    @classmethod
    def of(cls, message: Message) -> _Message:
        text = "".join(part.text for part in message.content if isinstance(part, TextContent))
        return cls(message.author.role == Role.ASSISTANT, message.channel, message.recipient, text)


def _message_error(messages: Sequence[_Message], recipients: Collection[str]) -> str | None:
    for place, one in enumerate(messages):
        if not one.by_assistant:
            return "a message that is not the assistant's"
        if one.channel not in _CHANNELS:
            return f"unknown channel {one.channel!r}" if one.channel else "a message without a channel"
        if one.recipient is not None and one.recipient not in recipients:
            return f"a call to {one.recipient!r}, which the conversation does not declare"
        if one.channel == "final" and place + 1 < len(messages):
            return "a message after the final one"
    return None


def _end_error(messages: Sequence[_Message], stop: int) -> str | None:
    """The error in how a completion of correct messages ends, or None."""
    if stop == END_OF_TEXT_ID:
        return "ended by <|endoftext|>, outside harmony"
    last = messages[-1] if messages else None
    if stop == CALL_ID:
        return None if last is not None and last.recipient is not None else "ended by <|call|> without a call"
    if last is None or last.channel != "final" or not last.text:
        return "ended without a final answer"
    return None


class TextStream:
    """Decodes tokens to (channel, text) one by one."""

    def __init__(self) -> None:
        self._parser = StreamableParser(harmony_encoding(), role=Role.ASSISTANT)

    def take(self, token: int) -> tuple[str, str] | None:
        """The channel and text that a token completes, or None.

        Raises:
            HarmonyError: harmony does not allow the token here.
        """
        self._parser.process(token)
        text = self._parser.last_content_delta
        return (self._parser.current_channel or "none", text) if text else None
