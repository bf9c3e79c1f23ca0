"""Scores of evaluation sets example by example, by a training run and by `finetune evaluate`.

A training run scores the test set with the base before training and with the adapter after it. `finetune evaluate` does
both for several sets and generates answers; its scores go to disk as they come, so that a stopped evaluation resumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import GptOssForCausalLM

from finetune import log
from finetune.data.harmony.render import render_prompt
from finetune.errors import CheckError, ConfigError, InputError
from finetune.evaluate.evalset import EvalSet
from finetune.evaluate.generation import Sampling, generate, read_completion
from finetune.evaluate.labels import score_labels
from finetune.evaluate.likelihood import BetweenBatches, held_out_loss
from finetune.evaluate.opening import LoadedModel
from finetune.figures import MODELS, Model
from finetune.files import JsonObject, write_text
from finetune.records import parse_line, parse_record, with_line_check

EXAMPLES_AT_ONCE = 128
PROMPTS_AT_ONCE = 8
_FIX = "choose another directory with --out, or remove it"


@dataclass(frozen=True)
class ExampleScore:
    """One model's scores of one example, a line of evaluation/rows.jsonl.

    Attributes:
        nll: weight x NLL summed over the trained tokens, in nats.
        weight: the sum of those weights.
        labels: log-likelihood of each candidate answer, in nats; None: not scored for this example.
        shared_nats: of these, the nats of what all answers begin with.
    """

    nll: float
    weight: float
    labels: list[float] | None
    shared_nats: float | None


@dataclass(frozen=True)
class GeneratedAnswer:
    """A model's answer to an example's prompt, a line of evaluation/rows.jsonl.

    Attributes:
        tokens: how many it wrote.
        question: the last message of the user.
        answer: the record's own.
        final, analysis: texts of these channels.
        stopped: it ended with a stop token; otherwise it was cut.
        error: what is wrong with its harmony format, or None.
    """

    tokens: int
    question: str
    answer: str | None
    final: str
    analysis: str
    stopped: bool
    error: str | None


def score_set(
    model: GptOssForCausalLM, evalset: EvalSet, name: Model, *, between_batches: BetweenBatches = lambda: None
) -> list[ExampleScore]:
    """Score a whole evaluation set with a model as it is; see `score_examples`."""
    total = len(evalset.examples) + len(evalset.labelled_examples)
    with log.Progress(f"{evalset.name}, {name}", total, "losses and labels") as progress:
        numbers = range(len(evalset.examples))
        return score_examples(model, evalset, name, numbers, progress, between_batches=between_batches)


def score_examples(
    model: GptOssForCausalLM,
    evalset: EvalSet,
    name: Model,
    numbers: Sequence[int],
    progress: log.Progress,
    *,
    between_batches: BetweenBatches = lambda: None,
) -> list[ExampleScore]:
    """Score some examples of an evaluation set, packed together.

    Args:
        model: in evaluation mode, with the adapter on or off.
        evalset: what the examples belong to.
        name: which model it is, for messages.
        numbers: of the examples.
        progress: advanced by the examples and by those whose labels are scored.
        between_batches: see `BetweenBatches`.

    Raises:
        CheckError: a loss or a label's score is not finite.
        InputError: a record's answer is not among the set's labels.
    """
    examples = [evalset.examples[n] for n in numbers]
    row_tokens = max([evalset.data.max_length, *(len(example.ids) for example in examples)])
    loss = held_out_loss(model, examples, row_tokens, between_batches=between_batches, progress=progress)
    for number, value in zip(numbers, loss.nll, strict=True):
        if not math.isfinite(value):
            raise CheckError(
                f"{evalset.name}: the loss of {name} on {evalset.records[number].where} is {value}",
                why="the model's numbers left the range of its dtype",
                fix="check the base, the adapter and this record; a lower trainer.learning_rate keeps adapters small",
            )
    labels: dict[int, list[float]] = {}
    shared: dict[int, float] = {}
    labelled = [n for n in numbers if n in evalset.labelled_examples]
    if evalset.labels is not None and labelled:
        records = [evalset.records[n] for n in labelled]
        scores = score_labels(
            model, records, evalset.labels, evalset.data, between_batches=between_batches, progress=progress
        )
        labels = dict(zip(labelled, scores.log_likelihood.tolist(), strict=True))
        shared = dict(zip(labelled, scores.shared.tolist(), strict=True))
    return [
        ExampleScore(float(nll), float(weight), labels.get(number), shared.get(number))
        for number, nll, weight in zip(numbers, loss.nll, loss.weight, strict=True)
    ]


def measure(
    opened: LoadedModel, evalsets: Sequence[EvalSet], scores: MeasurementLog, *, num_generated: int, sampling: Sampling
) -> None:
    """Add to a log what is missing in it.

    Args:
        opened: base and adapter.
        evalsets: what to score; the first one's prompts are answered too.
        scores: examples measured already are not measured again.
        num_generated: how many examples of the first set are answered.
        sampling: how.

    Raises:
        CheckError, InputError: see `score_examples`.
    """
    for model in MODELS:
        with nullcontext() if model == "adapter" else opened.adapter.disabled():
            for evalset in evalsets:
                _score(opened, evalset, model, scores)
            if evalsets and num_generated:
                _answer(opened, evalsets[0], model, scores, num_generated, sampling)


def _score(opened: LoadedModel, evalset: EvalSet, model: Model, scores: MeasurementLog) -> None:
    labelled = evalset.labelled_examples
    missing = scores.missing("score", model, evalset.name, range(len(evalset.examples)))
    total, left = len(evalset.examples) + len(labelled), len(missing) + len(labelled.intersection(missing))
    with log.Progress(f"{evalset.name}, {model}", total, "losses and labels") as progress:
        progress.start_at(total - left)
        for chunk in _chunks(missing, EXAMPLES_AT_ONCE):
            found = score_examples(opened.base.model, evalset, model, chunk, progress)
            scores.append("score", model, evalset.name, zip(chunk, found, strict=True))


def _answer(
    opened: LoadedModel, evalset: EvalSet, model: Model, scores: MeasurementLog, count: int, sampling: Sampling
) -> None:
    numbers = evalset.answered_examples(count)
    missing = scores.missing("text", model, evalset.name, numbers)
    with log.Progress(f"answers, {model}", len(numbers), "examples") as progress:
        progress.start_at(len(numbers) - len(missing))
        for chunk in _chunks(missing, PROMPTS_AT_ONCE):
            prompts = [render_prompt(evalset.records[n], evalset.data) for n in chunk]
            written = generate(opened.base.model, prompts, sampling, numbers=chunk)
            answers = [(n, _read_answer(evalset, n, tokens)) for n, tokens in zip(chunk, written, strict=True)]
            scores.append("text", model, evalset.name, answers)
            progress.advance(len(chunk))


def _read_answer(evalset: EvalSet, number: int, tokens: list[int]) -> GeneratedAnswer:
    record = evalset.records[number]
    read = read_completion(tokens, record.conversation.tools.recipients)
    question = next((message.content for message in reversed(record.messages) if message.role == "user"), "")
    return GeneratedAnswer(len(tokens), question, record.answer, read.final, read.analysis, read.stopped, read.error)


def _chunks(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


class Key(NamedTuple):
    """Key of a measurement: its kind (`score` or `text`), model, evaluation set and example."""

    measured: str
    who: Model
    suite: str
    row: int


class MeasurementLog:
    """rows.jsonl: a first line with what it belongs to, then one line per measured example.

    Args:
        path: made if it does not exist.
        belongs_to: settings under which all figures in the file were measured, as JSON data.

    Raises:
        ConfigError: the file belongs to something else.
        InputError: it does not say what it belongs to.
    """

    def __init__(self, path: Path, belongs_to: JsonObject) -> None:
        self._path, self._measured = path, dict[Key, ExampleScore | GeneratedAnswer]()
        texts = _lines(path)
        if not texts:
            write_text(path, json.dumps(with_line_check({"belongs_to": belongs_to})) + "\n")
            return
        try:
            there = parse_line(texts[0])["belongs_to"]
            differing = sorted(key for key in {*there, *belongs_to} if there.get(key) != belongs_to.get(key))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: its first line does not say what it belongs to", why=str(error), fix=_FIX
            ) from error
        if differing:
            raise ConfigError(
                f"{path} holds another evaluation's figures",
                why=f"it differs in {', '.join(differing)}",
                fix=_FIX,
            )
        # A line cut short by a kill would otherwise swallow the next one.
        write_text(path, "".join(f"{text}\n" for text in [texts[0], *self._add_all(texts[1:])]))

    def __len__(self) -> int:
        return len(self._measured)

    def missing(self, measured: str, model: Model, evalset: str, numbers: Iterable[int]) -> list[int]:
        """Those of the examples that are not measured yet."""
        return [number for number in numbers if Key(measured, model, evalset, number) not in self._measured]

    def scores(self, model: Model, evalset: str, numbers: Iterable[int]) -> list[ExampleScore]:
        """Scores of some examples.

        Raises:
            KeyError: one is missing.
        """
        found = [self._measured[Key("score", model, evalset, number)] for number in numbers]
        return [each for each in found if isinstance(each, ExampleScore)]

    def answers(self, model: Model, evalset: str, numbers: Iterable[int]) -> list[GeneratedAnswer]:
        """Generated answers to some examples.

        Raises:
            KeyError: one is missing.
        """
        found = [self._measured[Key("text", model, evalset, number)] for number in numbers]
        return [each for each in found if isinstance(each, GeneratedAnswer)]

    def append(
        self, measured: str, model: Model, evalset: str, found: Iterable[tuple[int, ExampleScore | GeneratedAnswer]]
    ) -> None:
        """Add measurements of numbered examples, and write them to disk."""
        with self._path.open("a", encoding="utf-8") as file:
            for number, each in found:
                key = Key(measured, model, evalset, number)
                self._measured[key] = each
                file.write(json.dumps(with_line_check(key._asdict() | asdict(each))) + "\n")

    def _add_all(self, texts: Sequence[str]) -> list[str]:
        """Take over the lines that are as they were written; logs which are not, and returns those that are."""
        good, bad = [], []
        for number, text in enumerate(texts, start=2):
            try:
                self._add(parse_line(text))
            except (ValueError, InputError) as error:
                bad.append(f"line {number} ({error})")
            else:
                good.append(text)
        if bad:
            more = f" and {len(bad) - 3:,} more" if len(bad) > 3 else ""
            log.warning(f"{self._path}: {'; '.join(bad[:3])}{more}: left out, and measured again")
        return good

    def _add(self, line: JsonObject) -> None:
        key = parse_record(Key, [line.get(name) for name in Key._fields], "its key")
        values = {name: value for name, value in line.items() if name not in Key._fields}
        kind: type[ExampleScore | GeneratedAnswer] = ExampleScore if key.measured == "score" else GeneratedAnswer
        self._measured[key] = parse_record(kind, values, "its figures")


def _lines(path: Path) -> list[str]:
    """The lines of a file, but for a last one that a kill has cut short."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", fix=_FIX) from error
    return texts[:-1]  # what follows the last newline: nothing, or half a line
