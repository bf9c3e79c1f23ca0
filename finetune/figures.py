"""Figures of an evaluation: a value with its interval, both models compared, and pairs of answers.

The parts that `results.py` is made of; free of torch. Attributes are the keys of the files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Model = Literal["base", "adapter"]
MODELS: tuple[Model, Model] = ("base", "adapter")
"""`adapter` is the base with its adapter."""


@dataclass(frozen=True)
class Figure:
    """A measured value.

    Attributes:
        value: such as nats per trained token, or a share.
        interval: lower and upper end at the evaluation's confidence level; None: measured on one record.
    """

    value: float
    interval: tuple[float, float] | None

    def text(self, form: str = ".3f") -> str:
        """The value and its interval in a number format.

        >>> Figure(0.5, (0.4, 0.6)).text(), Figure(2.5, None).text(".1f")
        ('0.500 [0.400, 0.600]', '2.5')
        """
        if self.interval is None:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} [{self.interval[0]:{form}}, {self.interval[1]:{form}}]"

    def headline(self) -> str:
        """The value and its interval as reports and cards show them."""
        return self.text() + ("" if self.interval else " (one record: no interval)")


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: examples that only the base, and only the adapter, has right, and the two-sided p-value."""

    lost: int
    gained: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """One measure of both models; None: not measured (yet).

    Attributes:
        base, adapter: each model's figure.
        difference: adapter minus base, paired example by example.
        mcnemar: of a share of right answers.
    """

    base: Figure | None = None
    adapter: Figure | None = None
    difference: Figure | None = None
    mcnemar: McNemar | None = None

    def of(self, model: Model) -> Figure | None:
        """One model's figure."""
        return self.base if model == "base" else self.adapter

    def updated(self, model: Model, other: Comparison) -> Comparison:
        """This comparison with one model's figure taken from another one; what compares the two is dropped."""
        figures = {name: (other if name == model else self).of(name) for name in MODELS}
        return Comparison(figures["base"], figures["adapter"])


@dataclass(frozen=True)
class PairFigures:
    """How often the better of two answers is preferred; None: not measured.

    Attributes:
        pairs: number of pairs.
        accuracy: share of pairs whose better answer has the higher log-probability after its prompt.
        margin: mean log-probability of the better answer minus that of the other, in nats.
        reward_accuracy: share of pairs whose better answer gained more log-probability over the base than the other.
        shorter_wins: accuracy of preferring the answer with fewer tokens.
        shuffled: `accuracy` with prompts exchanged among records; above 0.5 the answers alone tell which is better.
    """

    pairs: int
    accuracy: Comparison
    margin: Comparison
    reward_accuracy: Figure | None = None
    shorter_wins: Figure | None = None
    shuffled: Comparison | None = None

    def updated(self, model: Model, other: PairFigures) -> PairFigures:
        """These figures with one model's accuracy and margin taken from others on the same pairs."""
        return dataclasses.replace(
            self,
            accuracy=self.accuracy.updated(model, other.accuracy),
            margin=self.margin.updated(model, other.margin),
            reward_accuracy=other.reward_accuracy,
            shuffled=(self.shuffled or Comparison()).updated(model, other.shuffled)
            if other.shuffled
            else self.shuffled,
        )
