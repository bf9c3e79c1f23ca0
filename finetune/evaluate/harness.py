"""A model class for EleutherAI's lm-evaluation-harness: its tasks on base + adapter, packed weights and no merge.

    from lm_eval import simple_evaluate
    from finetune.evaluate.harness import AdaptedModel

    simple_evaluate(AdaptedModel("runs/NAME"), tasks=["arc_easy"])

Needs `pip install gpt-oss-finetune[eval]`; nothing else of the toolkit imports this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from finetune import log
from finetune.data.conversation import Conversation, Message
from finetune.data.harmony.encode import encode_text, header_ids
from finetune.data.harmony.render import render_prompt
from finetune.data.harmony.tokenizer import END_OF_TEXT_ID, FIRST_CONTROL_ID, harmony_encoding
from finetune.data.sources import Record
from finetune.errors import ConfigError, InputError
from finetune.evaluate.generation import STOP_IDS, Sampling, generate
from finetune.evaluate.likelihood import Group, score_groups
from finetune.evaluate.opening import open_model
from finetune.results import Json

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of the harness: (context, continuation) as text, and the token ids of both. None: not to be cached."""
Batch = tuple[list[int], list[str], Sampling]
"""Requests that are answered together: their numbers, stop strings and sampling."""

SEQUENCE_TOKENS = 4096
PROMPTS_AT_ONCE = 8
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
_MARK = "\ue0ff"
"""A private character beside a control token in a chat prompt: text that spells one stays text."""
_CONTROL = re.compile(f"{_MARK}(<\\|[a-z_0-9]+\\|>){_MARK}")


class AdaptedModel(TemplateLM):
    """A base with or without its adapter, behind the harness's model interface.

    Args:
        run: a run directory, or an adapter directory.
        adapter: False scores the base alone.
        base, revision, device: see `finetune.evaluate.opening.open_model`.
        max_length: tokens of a context and its continuation together; longer contexts are cut from the left, with a
            warning that says how many.
        max_gen_toks: new tokens, for tasks that do not set them.
        seed: of sampling, for tasks that sample.

    Raises:
        FinetuneError: whatever is wrong with adapter or base.
    """

    def __init__(
        self, run: str | Path, *, adapter: bool = True, base: str | None = None, revision: str | None = None,
        device: str | None = None, max_length: int = 4096, max_gen_toks: int = 256, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.opened = open_model(Path(run), base=base, revision=revision, device=device)
        self._with_adapter, self._seed = adapter, seed
        self._device = self.opened.base.device
        self.max_length, self.max_gen_toks = max_length, max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """`<|endoftext|>`."""
        return END_OF_TEXT_ID

    @property
    def prefix_token_id(self) -> int:
        """`<|startoftext|>`, the context of a text without one, as in the harness's own `hf` model."""
        return FIRST_CONTROL_ID

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's caches."""
        return "o200k_harmony"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Encode text; what looks like a control token is text, except those that `apply_chat_template` marked."""
        ids: list[int] = []
        for number, piece in enumerate(_CONTROL.split(string)):
            control = number % 2 == 1
            ids += harmony_encoding().encode(piece, allowed_special="all") if control else encode_text(piece)
        return ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens; an incomplete character becomes the replacement character."""
        return harmony_encoding().decode(list(tokens))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The name of the one chat template, for `apply_chat_template`.

        Raises:
            ConfigError: another one is requested by name.
        """
        if isinstance(chat_template, str) and chat_template != "harmony":
            raise ConfigError(f"unknown chat template {chat_template!r}", fix="--apply_chat_template without a name")
        return "harmony" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as harmony, up to and including the header of the final channel.

        The model has to answer at once: the harness compares answers, and does not support an analysis channel. With
        `add_generation_prompt=False` the last message is the beginning of the answer.

        Raises:
            InputError: a role that harmony does not have, or the private character that marks control tokens.
        """
        history = list(chat_history)
        begun = "" if add_generation_prompt else history.pop()["content"]
        for message in history:
            if _MARK in message["content"] + begun:
                raise InputError("a message contains U+E0FF, which this class reserves", fix="remove it")
            if message["role"] not in ("system", "developer", "user", "assistant"):
                raise InputError(f"harmony has no role {message['role']!r} in a prompt")
        messages = tuple(Message(message["role"], message["content"]) for message in history)  # type: ignore[arg-type]
        record = Record("chat", "chat", Conversation(messages))
        final = header_ids("assistant", "final")[2:]  # the prompt ends with `<|start|>assistant`
        ids = [*render_prompt(record, self.opened.data), *final]
        return "".join(_spell(ids)) + begun

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        answers = [list(continuation) for _, _, continuation in requests]
        cut = 0
        for number, (_, context, continuation) in enumerate(requests):
            room = self.max_length - len(continuation)
            if room < 1:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens and leaves no room for its context",
                    fix="raise max_length",
                )
            cut += len(context) > room
            # The harness moves white space at a context's end into the continuation, which may leave an empty context.
            groups.setdefault(tuple(context[-room:] or [self.prefix_token_id]), []).append(number)
        self._warn_of_cuts(cut, len(requests))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with self._adapter_as_configured(), log.Progress("likelihoods", len(groups), "contexts") as progress:
            for sequence in _sequences([(list(context), numbers) for context, numbers in groups.items()], answers):
                scores = score_groups(
                    self.opened.base.model,
                    [Group(context, [answers[number] for number in numbers]) for context, numbers in sequence],
                )
                for (_, numbers), score in zip(sequence, scores, strict=True):
                    for place, number in enumerate(numbers):
                        found[number] = float(score.log_likelihood[place]), bool(score.is_greedy[place])
                        if (request := requests[number][0]) is not None:
                            self.cache_hook.add_partial("loglikelihood", request, found[number])
                progress.advance(len(sequence))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows if they exceed `max_length`, as in the harness's own models."""
        asked: list[Scored] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
            for context, continuation in map(make_disjoint_window, windows):
                asked.append((None, context, continuation))  # a window's likelihood is not the text's
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (nats, _) in zip(owner, self._loglikelihood_tokens(asked), strict=True):
            totals[number] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop string, a stop token or the limit.

        Raises:
            ConfigError: an unknown generation setting.
            InputError: a task asks for so many new tokens that none are left for a context.
        """
        texts = [""] * len(requests)
        batches = list(_batches(requests, self.max_gen_toks, self._seed))
        prompts = self._prompts(requests, batches)
        with self._adapter_as_configured(), log.Progress("answers", len(requests), "prompts") as progress:
            for numbers, until, sampling in batches:
                written = generate(
                    self.opened.base.model,
                    [prompts[number] for number in numbers],
                    sampling,
                    numbers=numbers,
                    is_finished=partial(self._has_stopped, until),
                )
                for number, tokens in zip(numbers, written, strict=True):
                    text = self.tok_decode([token for token in tokens if token not in STOP_IDS])
                    texts[number] = text[: _stop_place(text, until)]
                    self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                progress.advance(len(numbers))
        return texts

    def _prompts(self, requests: Sequence[Instance], batches: Sequence[Batch]) -> dict[int, list[int]]:
        """Contexts as tokens, cut from the left to leave room for the answers; done before the first answer."""
        prompts: dict[int, list[int]] = {}
        cut = 0
        for numbers, _, sampling in batches:
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise InputError(
                    f"a task asks for {sampling.max_tokens:,} new tokens, and context and answer together have "
                    f"{self.max_length:,}",
                    fix=f"raise max_length above {sampling.max_tokens:,}, or lower the task's max_gen_toks",
                )
            for number in numbers:
                ids = self.tok_encode(requests[number].args[0])
                cut += len(ids) > room
                prompts[number] = ids[-room:] or [self.prefix_token_id]
        self._warn_of_cuts(cut, len(requests))
        return prompts

    def _warn_of_cuts(self, cut: int, total: int) -> None:
        if cut:
            log.warning(
                f"{cut} of {total} contexts are cut from the left, to {self.max_length} tokens with what follows them"
            )

    def _has_stopped(self, until: Sequence[str], tokens: Sequence[int]) -> bool:
        """Whether the last token completed a stop string; only as many tokens are decoded as can contain one."""
        longest = max((len(stop.encode()) for stop in until), default=0)
        return _stop_place(self.tok_decode(tokens[-longest - 1 :]), until) is not None

    def _adapter_as_configured(self) -> AbstractContextManager[object]:
        return nullcontext() if self._with_adapter else self.opened.adapter.disabled()


def _sequences(
    groups: Sequence[tuple[list[int], list[int]]], answers: Sequence[Sequence[int]]
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Pack groups (context, numbers of its answers) into sequences of about SEQUENCE_TOKENS; longer ones are alone."""
    sequence: list[tuple[list[int], list[int]]] = []
    used = 0
    for context, numbers in sorted(groups, key=lambda group: len(group[0])):
        size = len(context) + sum(len(answers[number]) for number in numbers)
        if sequence and used + size > SEQUENCE_TOKENS:
            yield sequence
            sequence, used = [], 0
        sequence.append((context, numbers))
        used += size
    if sequence:
        yield sequence


def _batches(requests: Sequence[Instance], max_tokens: int, seed: int) -> Iterator[Batch]:
    """Batches of up to PROMPTS_AT_ONCE requests with the same settings."""
    alike: dict[tuple[tuple[str, ...], Sampling], list[int]] = {}
    for number, request in enumerate(requests):
        until, sampling = _settings(request.args[1], max_tokens, seed)
        alike.setdefault((until, sampling), []).append(number)
    for (until, sampling), numbers in alike.items():
        for start in range(0, len(numbers), PROMPTS_AT_ONCE):
            yield numbers[start : start + PROMPTS_AT_ONCE], list(until), sampling


def _settings(given: Json, max_tokens: int, seed: int) -> tuple[tuple[str, ...], Sampling]:
    unknown = sorted(set(given) - _GENERATION_KEYS)
    if unknown:
        raise ConfigError(
            f"generation settings {', '.join(unknown)} are not supported",
            fix=f"supported are {', '.join(sorted(_GENERATION_KEYS))}",
        )
    until = given.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    is_sampled = given.get("do_sample", float(given.get("temperature") or 0.0) > 0)
    temperature = float(given.get("temperature", 1.0)) if is_sampled else 0.0
    count = int(given.get("max_gen_toks", max_tokens))
    return tuple(filter(None, stops)), Sampling(count, temperature, float(given.get("top_p", 1.0)), seed)


def _stop_place(text: str, until: Sequence[str]) -> int | None:
    """The place where the first stop string begins; None if there is none."""
    return min((place for place in (text.find(stop) for stop in until) if place >= 0), default=None)


def _spell(ids: Sequence[int]) -> Iterator[str]:
    """Decode token ids, marking control tokens."""
    encoding, plain = harmony_encoding(), list[int]()
    for token in ids:
        if token < FIRST_CONTROL_ID:
            plain.append(token)
            continue
        yield encoding.decode_utf8(plain)
        plain = []
        yield f"{_MARK}{encoding.decode_utf8([token])}{_MARK}"
    yield encoding.decode_utf8(plain)
