"""Plan of `bench/compare.py`: tasks, kinds of adapter at equal parameters, controls, and the order of the runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from finetune.adapters.sites import plan_sites
from finetune.arch import Arch
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig

TaskName = Literal["legal", "medical", "creative"]
Labels = Literal["as they are", "shuffled", "renamed", "renamed and shuffled"]
BaseName = Literal["given", "constructed"]


@dataclass(frozen=True)
class Task:
    """Records of one domain: their number and the epochs.

    Attributes:
        train_rows, validation_examples, test_examples: at most; drawn once for all runs.
        epochs: over the training records.
    """

    train_rows: int
    validation_examples: int
    test_examples: int
    epochs: int = 1


@dataclass(frozen=True)
class Setting:
    """Settings of a base's recipes that all variants share.

    Attributes:
        ranks: of attention and experts in the reference variant, whose parameters the others match.
        alphas: kept when a rank changes, so that one learning rate means much the same at every rank (the update is
            scaled by alpha / rank).
        learning_rates: tried for every kind with the first seed; the one with the least validation loss is taken.
        validate_every: optimiser steps between validation losses.
        constructed_base: also run a control on a base without knowledge, which only a tiny one can be.
        experts_per_chunk: experts dequantised at a time. None: as the model's configuration says.
    """

    model: str
    ranks: tuple[int, int]
    alphas: tuple[float, float]
    learning_rates: tuple[float, ...]
    gradient_accumulation_steps: int
    max_length: int
    activation_checkpointing: bool
    validate_every: int
    constructed_base: bool
    tasks: dict[TaskName, Task]
    experts_per_chunk: int | None = None


TINY = Setting(
    model="tiny", ranks=(16, 16), alphas=(32.0, 32.0), learning_rates=(1e-2, 5e-3, 2e-2), gradient_accumulation_steps=1,
    max_length=2048, activation_checkpointing=False, validate_every=50, constructed_base=True,
    tasks={"legal": Task(1000, 150, 200), "medical": Task(437, 63, 200), "creative": Task(120, 24, 30)},
)  # fmt: skip
LARGE_20B = Setting(
    model="gpt_oss_20b", ranks=(16, 4), alphas=(32.0, 8.0), learning_rates=(2e-4, 4e-4, 1e-4),
    gradient_accumulation_steps=4,
    max_length=4096, activation_checkpointing=True, validate_every=50, constructed_base=False,
    tasks={"legal": Task(10**6, 200, 10**6, 2), "medical": Task(10**6, 63, 10**6, 2),
           "creative": Task(10**6, 162, 10**6, 2)},
)  # fmt: skip
LARGE_120B = replace(LARGE_20B, model="gpt_oss_120b", experts_per_chunk=8)


@dataclass(frozen=True)
class Variant:
    """One kind of adapter.

    Attributes:
        name: as in the table.
        attention, experts: ranks; 0 leaves them alone.
        router: mode.
        select: which experts.
        rank_by: how the experts' ranks are distributed.
        balance: coefficient of the load-balancing loss. None: the default.
        timed_by: name of a variant whose training time it gets, however many steps that is. None: equal numbers of
            examples.
        same_adapter: name of the variant with this adapter, whose learning rate it takes. With `timed_by` that one
            also gives the time of a step.
    """

    name: str
    attention: int
    experts: int
    router: str = "frozen"
    select: str = "all"
    rank_by: str = "uniform"
    balance: float | None = None
    timed_by: str | None = None
    same_adapter: str | None = None

    def overrides(self, setting: Setting) -> list[str]:
        """Command-line overrides of the variant."""
        words = [
            f"adapter.attention.rank={self.attention}",
            f"adapter.attention.alpha={setting.alphas[0]}",
            f"adapter.experts.rank={self.experts}",
            f"adapter.experts.alpha={setting.alphas[1]}",
        ]
        if self.router != "frozen":
            words.append(f"adapter.router.mode={self.router}")
        if self.select != "all":
            words.append(f"adapter.experts.select='{self.select}'")
        if self.rank_by != "uniform":
            words.append(f"adapter.experts.rank_by={self.rank_by}")
        if self.balance is not None:
            words.append(f"trainer.router_balance_coefficient={self.balance}")
        return words


@dataclass(frozen=True)
class Line:
    """One line of the table: the settings that its seeds share.

    Attributes:
        labels: what is done to the answers; anything but `as they are` is a control.
        base: the one given, or a constructed one, which has seen no text.
    """

    task: TaskName
    variant: Variant
    labels: Labels = "as they are"
    base: BaseName = "given"

    @property
    def name(self) -> str:
        """Name in the table."""
        parts = [self.variant.name]
        parts += [f"labels {self.labels}"] if self.labels != "as they are" else []
        parts += ["constructed base"] if self.base != "given" else []
        return ", ".join(parts)

    @property
    def must_learn_nothing(self) -> bool:
        """Whether neither the training records nor the base determine the right answer.

        Shuffled labels alone do not ensure that: a pretrained base associates clauses with words of the labels' names,
        and learning the form of an answer reveals that. Under other names, or in a base trained on no text, it
        is worth nothing.
        """
        return self.labels == "renamed and shuffled" or (self.labels == "shuffled" and self.base == "constructed")


@dataclass(frozen=True)
class Run:
    """One training run of a line."""

    line: Line
    seed: int
    learning_rate: float
    steps: int | None = None


def variants(setting: Setting, shape: Arch) -> dict[str, Variant]:
    """The kinds of adapter, with ranks that give the parameters of the first where the name says so."""
    attention, experts = setting.ranks
    target = num_parameters(shape, attention, experts)
    equal_attention = max(1, round(target / num_parameters(shape, 1, 0)))
    equal_experts = max(1, round(target / num_parameters(shape, 0, 1)))
    fewer = (max(1, attention // 4), max(1, experts // 4))
    half = max(1, shape.num_experts // 2)
    found = (
        Variant(f"attention and experts, r={attention}/{experts}", attention, experts),
        Variant(f"attention only, equal parameters, r={equal_attention}", equal_attention, 0),
        Variant(f"experts only, equal parameters, r={equal_experts}", 0, equal_experts),
        Variant(f"attention only, r={attention}", attention, 0),
        Variant(f"attention and experts, r={fewer[0]}/{fewer[1]}", *fewer),
        Variant(f"attention and experts, r={attention}/{experts}, router full", attention, experts, router="full"),
        Variant(f"attention and experts, r={attention}/{experts}, router lora", attention, experts, router="lora"),
        Variant(f"attention and the {half} most used experts, r={attention}/{experts}", attention, experts,
                select=f"top_k={half}"),
        Variant(f"attention and experts, r={attention}/{experts}, ranks by use", attention, experts, rank_by="gate"),
    )  # fmt: skip
    both, equal, full = found[0], found[1], found[5]
    name = f"attention only, equal parameters and time, r={equal_attention}"
    derived = (
        replace(equal, name=name, timed_by=both.name, same_adapter=equal.name),
        *(replace(kind, name=f"{kind.name}, balance {coefficient:g}", balance=coefficient, same_adapter=kind.name)
          for kind, coefficient in ((both, 0.0), (both, 0.01), (full, 0.0), (full, 0.01))),
    )  # fmt: skip
    return {variant.name: variant for variant in (*found, *derived)}


def num_parameters(shape: Arch, attention: int, experts: int) -> int:
    """Trained parameters of these ranks on every projection and every expert."""
    config = AdapterConfig(attention=AttentionAdapterConfig(rank=attention), experts=ExpertAdapterConfig(rank=experts))
    return sum(site.num_parameters for site in plan_sites(shape, config))


def plan(setting: Setting, shape: Arch) -> list[list[Line]]:
    """All lines in tiers, the most important first, so that an interrupted program has complete comparisons.

    The seeds of a tier alternate: each of its lines has its first seed before one has its second.
    """
    first, attention, experts, small, few, full, lora, half, by_use, timed, *balance = variants(setting, shape).values()
    no_knowledge = [Line("legal", first, "shuffled", "constructed")] if setting.constructed_base else []
    return [
        [
            Line("legal", first),
            Line("legal", first, "renamed and shuffled"),
            *no_knowledge,
            Line("legal", attention),
            Line("legal", first, "shuffled"),
            Line("legal", first, "renamed"),
        ],
        [Line("legal", experts)],
        [Line("medical", first), Line("creative", first)],
        [Line("legal", timed)],
        [Line("legal", full)],
        [Line("legal", small)],
        [Line("legal", half)],
        [Line("legal", few)],
        [Line("legal", lora)],
        [Line("creative", attention), Line("medical", attention)],
        [Line("legal", variant) for variant in balance],
        [Line("legal", by_use)],
    ]
