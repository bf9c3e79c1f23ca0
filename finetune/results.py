"""Results of an evaluation: the base and base + adapter on the same examples.

A training run writes them to evaluation.json, `finetune evaluate` to evaluation/summary.json, both in this form, and
reports, model cards and sweeps read them with `read_evaluation`. Free of torch. Attributes are the keys of the files,
which call examples `rows` and an evaluation set a `suite`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import InputError
from finetune.figures import MODELS, Comparison, Figure, Model, PairFigures
from finetune.files import JsonObject, read_json
from finetune.records import parse_record, without_checksums, write_checked_json

_FIX = "put the file back as it was written, or remove it: a resumed run scores its base again"


class ReliabilityBin(NamedTuple):
    """Examples of one bin of confidence: how many, their accuracy and mean confidence, the accuracy's interval."""

    rows: int
    accuracy: float
    confidence: float
    low: float
    high: float


@dataclass(frozen=True)
class OneLabel:
    """One model's figures on one label; None: nothing to measure it on."""

    chosen: int
    precision: Figure | None
    recall: Figure | None
    f1: Figure | None


@dataclass(frozen=True)
class LabelFigures:
    """Both models' figures on one label, which is the right one of `rows` examples."""

    label: str
    rows: int
    base: OneLabel
    adapter: OneLabel

    def of(self, model: Model) -> OneLabel:
        """One model's figures."""
        return self.base if model == "base" else self.adapter


@dataclass(frozen=True)
class SuiteFigures:
    """Figures of one evaluation set. Those of labels are None where labels were not scored, or one model alone was.

    Attributes:
        suite: its name: `test`, or a domain of the retention sets.
        rows: examples.
        records: the records that they belong to, which intervals resample.
        loss: nats per trained token, of the best answers where a record has several.
        perplexity: exp of the loss.
        num_labels: candidate labels.
        best_constant: accuracy of always giving the most frequent answer.
        accuracy: by the likelihood of the whole answer.
        macro_f1, calibration_error: of the same choices.
        reliability: by model, bins of confidence that have examples.
        labels, confusion: by model, counts [own label][chosen label] in the order of `labels`.
        per_label: figures of each label.
        most_confused: (own label, label chosen with the adapter, count) of the most frequent mistakes.
        accuracy_per_token: by likelihood per token of the answer's own.
        pairs: figures of pairs of answers.
    """

    suite: str
    rows: int
    records: int
    loss: Comparison
    perplexity: Comparison
    num_labels: int | None = None
    best_constant: float | None = None
    accuracy: Comparison | None = None
    macro_f1: Comparison | None = None
    calibration_error: Comparison | None = None
    reliability: dict[Model, list[ReliabilityBin]] | None = None
    labels: list[str] | None = None
    confusion: dict[Model, list[list[int]]] | None = None
    per_label: list[LabelFigures] | None = None
    most_confused: list[tuple[str, str, int]] | None = None
    accuracy_per_token: Comparison | None = None
    pairs: PairFigures | None = None

    def updated(self, model: Model, other: SuiteFigures) -> SuiteFigures:
        """These figures with one model's loss, perplexity and accuracy taken from others on the same examples."""
        accuracy = self.accuracy and other.accuracy and self.accuracy.updated(model, other.accuracy)
        loss, perplexity = self.loss.updated(model, other.loss), self.perplexity.updated(model, other.perplexity)
        pairs = self.pairs and other.pairs and self.pairs.updated(model, other.pairs)
        return dataclasses.replace(self, loss=loss, perplexity=perplexity, accuracy=accuracy, pairs=pairs)


@dataclass(frozen=True)
class FormFigures:
    """Endings of one model's generated answers: counts, mean length, and intervals of the shares."""

    stopped: int
    cut: int
    format_errors: int
    refusals: int
    mean_tokens: float
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class TextFigures:
    """Variety, copying and voice of generated prose; None: not measured.

    Attributes:
        distinct_1, distinct_2: different words, and pairs of words, as a share of all.
        empty, refusals: texts.
        longest_copy_words, median_copy_words: words in the longest run copied from a training text.
        own_author: share of texts attributed to their record's author.
        own_author_balanced: mean of that share over authors.
    """

    distinct_1: float
    distinct_2: float
    empty: int
    refusals: int
    longest_copy_words: int | None = None
    median_copy_words: float | None = None
    own_author: float | None = None
    own_author_balanced: float | None = None


@dataclass(frozen=True)
class AuthorFigures:
    """Authors of the training records: how many, the largest share of examples by one, examples by none of them."""

    known: int
    largest_share: float
    unknown_rows: int


@dataclass(frozen=True)
class ProseFigures:
    """Figures of texts by who wrote them; `reference` are the records' own."""

    base: TextFigures | None = None
    adapter: TextFigures | None = None
    reference: TextFigures | None = None
    authors: AuthorFigures | None = None


@dataclass(frozen=True)
class AnswerFigures:
    """Figures of the answers generated to `rows` examples of an evaluation set.

    Attributes:
        base, adapter: form of the answers.
        exact_rows, exact: examples with an answer, and the share of generated ones equal to it.
        prose_rows, prose: examples without one.
    """

    suite: str
    rows: int
    base: FormFigures
    adapter: FormFigures
    exact_rows: int
    prose_rows: int
    exact: Comparison | None = None
    prose: ProseFigures | None = None


@dataclass(frozen=True)
class ContaminationFigures:
    """Test records seen in training.

    Attributes:
        rows, seen, touched, copies, too_short: records: all; with half of their 13-word sequences in training; with
            any; whose whole text is there; too short to tell.
        seen_ids: of the seen ones.
        without_seen: the test figures without them.
    """

    rows: int
    seen: int
    touched: int
    copies: int
    too_short: int
    seen_ids: list[str]
    without_seen: SuiteFigures | None = None


@dataclass(frozen=True)
class BaseName:
    """A base and the hash of its tensors."""

    name: str
    identity: str


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        adapter: directory.
        base: None in files of version 0.1, whose runs name it in manifest.json alone.
        confidence: level of all intervals.
        notes: what to know about the examples, in sentences.
        left_out: test records that were `skipped` or `dropped`, and `truncated` ones.
        suites: the test set first, then retention sets.
        contamination, answers: None: not measured.
    """

    adapter: str
    base: BaseName | None
    confidence: float
    notes: list[str]
    left_out: dict[str, int]
    suites: list[SuiteFigures]
    contamination: ContaminationFigures | None
    answers: AnswerFigures | None

    @property
    def test(self) -> SuiteFigures | None:
        """Figures of the test set."""
        return self.suites[0] if self.suites else None

    def headlines(self) -> list[tuple[str, Comparison]]:
        """`test loss` and, where labels or pairs were scored, `accuracy` and `pair accuracy` of the test set."""
        if self.test is None:
            return []
        pairs = self.test.pairs.accuracy if self.test.pairs else None
        found = [("test loss", self.test.loss), ("accuracy", self.test.accuracy), ("pair accuracy", pairs)]
        return [(title, figures) for title, figures in found if figures is not None]

    def final(self, title: str) -> float | None:
        """The adapter's value of one of the `headlines`."""
        figures = dict(self.headlines()).get(title)
        return figures.adapter.value if figures and figures.adapter else None

    def updated(self, model: Model, test: SuiteFigures) -> Evaluation:
        """This evaluation with one model's figures on the test set added or replaced."""
        return dataclasses.replace(self, suites=[self.test.updated(model, test) if self.test else test])

    def has(self, model: Model) -> bool:
        """Whether a model was measured on the test set."""
        return self.test is not None and self.test.loss.of(model) is not None


def perplexity(loss: Comparison) -> Comparison:
    """exp of both models' losses and of the ends of their intervals."""

    def exp(value: float) -> float:
        return math.exp(value) if value < 700 else math.inf

    def of(figure: Figure | None) -> Figure | None:
        if figure is None:
            return None
        ends = figure.interval
        return Figure(exp(figure.value), None if ends is None else (exp(ends[0]), exp(ends[1])))

    return Comparison(of(loss.base), of(loss.adapter))


def to_json(record: Any) -> Any:
    """A record of this module as JSON data, without optional keys that are None."""
    if dataclasses.is_dataclass(record):
        fields = ((field, getattr(record, field.name)) for field in dataclasses.fields(record))
        return {f.name: to_json(value) for f, value in fields if value is not None or f.default is not None}
    if isinstance(record, Mapping):
        return {key: to_json(value) for key, value in record.items()}
    if isinstance(record, Sequence) and not isinstance(record, str):
        return [to_json(value) for value in record]
    return record


def parse_evaluation(content: JsonObject) -> Evaluation:
    """An evaluation from JSON data, also from that of version 0.1.

    Raises:
        ValueError: it is something else.
    """
    from pydantic import TypeAdapter

    return TypeAdapter(Evaluation).validate_python(_from_v01(content) if "suites" not in content else content)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Replace evaluation.json or summary.json in one step, with checksums of its values."""
    write_checked_json(path, to_json(evaluation))


def read_evaluation(path: Path) -> Evaluation | None:
    """Read evaluation.json or summary.json; None if there is no such file.

    Raises:
        InputError: it is damaged, changed since it was written, or something else.
    """
    if not path.is_file():
        return None
    content: JsonObject = without_checksums(read_json(path, "the results of an evaluation", _FIX), path, _FIX)
    try:
        content = _from_v01(content) if "suites" not in content else content
    except ValueError as error:
        raise InputError(f"{path} does not hold the results of an evaluation", why=str(error), fix=_FIX) from error
    return parse_record(Evaluation, content, str(path), fix=_FIX)


def _from_v01(content: JsonObject) -> JsonObject:
    """evaluation.json of version 0.1, which had flat figures under `before` and `after`, in today's form."""
    models = {model: content[when] for model, when in zip(MODELS, ("before", "after"), strict=True) if when in content}
    if not models:
        raise ValueError("it has neither `suites` nor `before`")
    try:
        first = next(iter(models.values()))
        loss, accuracy = (
            {
                model: {"value": figures[key], "interval": figures[f"{key}_interval"]}
                for model, figures in models.items()
                if key in figures
            }
            for key in ("loss", "accuracy")
        )
        figures = {model: Figure(each["value"], each["interval"]) for model, each in loss.items()}
        both = perplexity(Comparison(figures.get("base"), figures.get("adapter")))
        labels = {"num_labels": first.get("num_labels"), "best_constant": first.get("best_constant_accuracy")}
        sizes = {"suite": "test", "rows": first["rows"], "records": first["rows"]}
        test = {**sizes, "loss": loss, "perplexity": to_json(both), **labels, "accuracy": accuracy or None}
        rest: JsonObject = {"notes": [], "left_out": {}, "contamination": None, "answers": None}
        return {"adapter": "adapter", "base": None, "confidence": first["confidence"], "suites": [test], **rest}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"version 0.1 would have {error}") from error
