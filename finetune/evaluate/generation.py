"""Text from a model: batched, with keys and values kept, reproducible by seed whatever stands in the same batch.

Shape legend: B sequences still going, V vocabulary.
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
"""Called with the prompt's number and each new token, in the order in which they come."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_tokens: new tokens at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: choose among the likeliest tokens that together have this probability.
        seed: of the random choices; prompt n draws from its own generator.
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
    """Continue prompts until each stops by itself or has `max_tokens` new ones.

    Args:
        model: in evaluation mode.
        prompts: token ids; all are read in one forward pass.
        sampling: how tokens are chosen.
        on_token: for streaming.
        numbers: which random draws each prompt uses; equal numbers draw alike in any batch. None: 0, 1, ...
        is_finished: whether a prompt's new tokens so far are enough, beside stop tokens and `max_tokens`.

    Returns:
        The new tokens of each prompt, the one that stopped it included.
    """
    decoder = Decoder(model, prompts, sampling.max_tokens)
    draws = range(len(prompts)) if numbers is None else numbers
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + number) for number in draws]
    written: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))  # prompt numbers, in the decoder's order
    hidden = decoder.read_prompts()
    while True:
        logits = model.lm_head(hidden).float()
        tokens = choose_tokens(logits, [generators[number] for number in going], sampling)
        for number, token in zip(going, tokens, strict=True):
            written[number].append(token)
            on_token(number, token)
        alive = [
            place
            for place, number in enumerate(going)
            if tokens[place] not in STOP_IDS
            and len(written[number]) < sampling.max_tokens
            and not is_finished(written[number])
        ]
        if not alive:
            return written
        if len(alive) < len(going):
            decoder.keep(alive)
            going = [going[place] for place in alive]
        hidden = decoder.read(torch.tensor([written[number][-1] for number in going]))


def choose_tokens(logits: Tensor, generators: Sequence[torch.Generator], sampling: Sampling) -> list[int]:
    """The next token of each sequence.

    Args:
        logits: float32 [B, V].
        generators: on the CPU, one a sequence.
        sampling: how.
    """
    if sampling.temperature == 0:
        chosen: list[int] = logits.argmax(-1).tolist()
        return chosen
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        # A token stays while those before it have less than top_p together; the likeliest always stays.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ranked)
    rows = probabilities.cpu()
    return [
        int(torch.multinomial(row, 1, generator=generator)) for row, generator in zip(rows, generators, strict=True)
    ]


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt, read as harmony.

    Attributes:
        final: text of the final channel, "" if it wrote none; texts of several are joined by an empty line.
        analysis: text of the analysis channel, likewise.
        stopped: it ended with a stop token; otherwise it was cut at `max_tokens`.
        error: what is wrong with its form, or None. A cut one is not wrong for being cut.
    """

    final: str
    analysis: str
    stopped: bool
    error: str | None


def read_completion(tokens: Sequence[int], recipients: Collection[str] = ()) -> Completion:
    """Read generated tokens as harmony's messages, and check that they are what harmony lets an assistant write.

    openai-harmony's parser refuses little: inside a message it takes any control token but the three end tokens for
    text. The checks beyond it follow https://cookbook.openai.com/articles/openai-harmony: an assistant thinks, calls a
    tool with `<|call|>`, or gives one final answer, which `<|return|>` ends.

    Args:
        tokens: without the prompt, the stop token included.
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
    written = [_Written.of(message) for message in parser.messages]
    if parser.state == StreamState.CONTENT:
        recipient, channel = parser.current_recipient, parser.current_channel
        written.append(_Written(parser.current_role == Role.ASSISTANT, channel, recipient, parser.current_content))
    error = error or _wrong_message(written, recipients) or (_wrong_end(written, tokens[-1]) if stopped else None)
    texts = {name: [one.text for one in written if one.channel == name] for name in ("final", "analysis")}
    return Completion("\n\n".join(texts["final"]), "\n\n".join(texts["analysis"]), stopped, error)


@dataclass(frozen=True)
class _Written:
    """A message of a completion, or the unfinished one at its end."""

    by_assistant: bool
    channel: str | None
    recipient: str | None
    text: str

    @classmethod
    def of(cls, message: Message) -> _Written:
        text = "".join(part.text for part in message.content if isinstance(part, TextContent))
        return cls(message.author.role == Role.ASSISTANT, message.channel, message.recipient, text)


def _wrong_message(written: Sequence[_Written], recipients: Collection[str]) -> str | None:
    for place, one in enumerate(written):
        if not one.by_assistant:
            return "a message that is not the assistant's"
        if one.channel not in _CHANNELS:
            return f"unknown channel {one.channel!r}" if one.channel else "a message without a channel"
        if one.recipient is not None and one.recipient not in recipients:
            return f"a call to {one.recipient!r}, which the conversation does not declare"
        if one.channel == "final" and place + 1 < len(written):
            return "goes on after its final message"
    return None


def _wrong_end(written: Sequence[_Written], stop: int) -> str | None:
    """What is wrong with where it stopped; its messages are right."""
    if stop == END_OF_TEXT_ID:
        return "ended by <|endoftext|>, outside harmony"
    last = written[-1] if written else None
    if stop == CALL_ID:
        return None if last is not None and last.recipient is not None else "ended by <|call|> without a call"
    if last is None or last.channel != "final" or not last.text:
        return "ended without a final answer"
    return None


class TextStream:
    """Turns tokens into (channel, text) one by one."""

    def __init__(self) -> None:
        self._parser = StreamableParser(harmony_encoding(), role=Role.ASSISTANT)

    def take(self, token: int) -> tuple[str, str] | None:
        """The text that a token completes and its channel, or None.

        Raises:
            HarmonyError: harmony allows no such token here.
        """
        self._parser.process(token)
        text = self._parser.last_content_delta
        return (self._parser.current_channel or "none", text) if text else None
