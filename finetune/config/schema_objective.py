"""The `objective` group: what a run minimises. One class per kind; `kind` chooses between them.

Log-probabilities are sums over an answer's trained tokens; "mean" ones are divided by their number. `r` is the reward
of an answer, beta times the log-probability that it gained over the reference. docs/guide/preference.md has the losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import Discriminator

from finetune.config.fields import Strict

DpoLoss = Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm", "sft"]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
PREFERENCE_LEARNING_RATE = 2e-5


@dataclass(frozen=True, kw_only=True)
class SftConfig(Strict):
    """Supervised fine-tuning: weighted negative log-likelihood of the trained tokens (`data.loss` has the weights).

    Attributes:
        kind: chooses this objective.
    """

    default_learning_rate: ClassVar[float] = 2e-4
    kind: Literal["sft"] = "sft"


@dataclass(frozen=True, kw_only=True)
class DpoConfig(Strict):
    """Direct preference optimisation: the better answer gains more over the reference than the worse one.

    Attributes:
        kind: chooses this objective.
        loss: of the margin m = r(chosen) - r(rejected), or of the two rewards. `sigmoid` is -log sigma(m) (Rafailov et
            al. 2023); `hinge` max(0, 1 - m); `ipo` (m/beta - 1/(2 beta))^2 of mean log-probabilities (Azar et al.
            2023); `robust` sigmoid with the bias of wrong labels taken off; `apo_zero` and `apo_down` anchored losses
            (D'Oosterlinck et al. 2024); `sigmoid_norm` sigmoid of mean log-probabilities; `sft` the chosen answer's
            negative log-likelihood alone.
        loss_weight: factor of `loss`, where others are added to it.
        add: further losses and their factors, such as {sft: 1.0}: with `sigmoid` that is RPO.
        beta: how strongly the model is held to the reference; higher: closer to it.
        label_smoothing: assumed share of pairs in the wrong order; only `sigmoid`, `robust` and `sigmoid_norm` use it.
        reference: `live` computes it for every micro-batch by the model without its adapter; `none` compares
            log-probabilities themselves (reference-free).
    """

    default_learning_rate: ClassVar[float] = PREFERENCE_LEARNING_RATE
    kind: Literal["dpo"] = "dpo"
    loss: DpoLoss = "sigmoid"
    loss_weight: Positive = 1.0
    add: dict[DpoLoss, Positive] = field(default_factory=dict)
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    reference: Literal["live", "none"] = "live"

    @property
    def losses(self) -> dict[DpoLoss, float]:
        """All losses and their factors."""
        return {self.loss: self.loss_weight} | self.add


@dataclass(frozen=True, kw_only=True)
class OrpoConfig(Strict):
    """Odds-ratio preference optimisation: likelihood of the chosen answer and its odds against the rejected one.

    Without a reference (Hong et al. 2024).

    Attributes:
        kind: chooses this objective.
        beta: weight of the odds-ratio loss beside the chosen answer's mean negative log-likelihood.
    """

    default_learning_rate: ClassVar[float] = PREFERENCE_LEARNING_RATE
    kind: Literal["orpo"] = "orpo"
    beta: Positive = 0.1


@dataclass(frozen=True, kw_only=True)
class SimpoConfig(Strict):
    """Simple preference optimisation: mean log-probabilities with a target margin, without a reference.

    Attributes:
        kind: chooses this objective.
        beta: factor of the difference of mean log-probabilities.
        gamma: margin that the difference, times beta, is to exceed (Meng et al. 2024).
    """

    default_learning_rate: ClassVar[float] = PREFERENCE_LEARNING_RATE
    kind: Literal["simpo"] = "simpo"
    beta: Positive = 2.0
    gamma: NotNegative = 1.0


@dataclass(frozen=True, kw_only=True)
class CpoConfig(Strict):
    """Contrastive preference optimisation: sigmoid loss without a reference, and the chosen answer's likelihood.

    Attributes:
        kind: chooses this objective.
        beta: factor of the difference of log-probabilities.
        alpha: weight of the chosen answer's mean negative log-likelihood (Xu et al. 2024).
        label_smoothing: assumed share of pairs in the wrong order.
    """

    default_learning_rate: ClassVar[float] = PREFERENCE_LEARNING_RATE
    kind: Literal["cpo"] = "cpo"
    beta: Positive = 0.1
    alpha: NotNegative = 1.0
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0


PreferenceConfig = DpoConfig | OrpoConfig | SimpoConfig | CpoConfig
"""The kinds that learn from pairs of answers."""
ObjectiveConfig = Annotated[SftConfig | DpoConfig | OrpoConfig | SimpoConfig | CpoConfig, Discriminator("kind")]
