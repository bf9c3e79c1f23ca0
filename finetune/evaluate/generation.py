"""Text from a model: batched, with keys and values kept, reproducible by seed whatever stands in the same batch.

Shape legend: B sequences still going, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from openai_harmony import HarmonyError, Role, StreamableParser
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune.data.tokenizer import CALL_ID, END_OF_TEXT_ID, RETURN_ID, harmony_encoding
from finetune.model.decoding import Decoder

STOP_IDS = frozenset({RETURN_ID, CALL_ID, END_OF_TEXT_ID})
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
        final: text of the final channel, "" if it wrote none.
        analysis: text of the analysis channel, "" if it wrote none.
        stopped: it ended with a stop token; otherwise it was cut at `max_tokens`.
        error: what is wrong with its form, or None. A cut one is not wrong for being cut.
    """

    final: str
    analysis: str
    stopped: bool
    error: str | None


def read_completion(tokens: Sequence[int]) -> Completion:
    """Read generated tokens as harmony's messages."""
    texts: dict[str, str] = {}
    error = None
    try:
        for channel, text in stream_text(tokens):
            texts[channel] = texts.get(channel, "") + text
    except HarmonyError as problem:
        error = str(problem)
    stopped = bool(tokens) and tokens[-1] in STOP_IDS
    if error is None and stopped and "final" not in texts and tokens[-1] == RETURN_ID:
        error = "ended without a final channel"
    return Completion(texts.get("final", ""), texts.get("analysis", ""), stopped, error)


def stream_text(tokens: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Text as it comes, with the channel it belongs to; headers and control tokens are left out.

    Yields:
        (channel, text). A character that several tokens make comes with its last one.

    Raises:
        HarmonyError: a token stands where harmony allows none like it; what came before was yielded.
    """
    stream = TextStream()
    for token in tokens:
        if text := stream.take(token):
            yield text


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
