"""What `bench/compare.py` compares: tasks, kinds of adapter at equal parameters, and the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from finetune.adapters.sites import plan_sites
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig
from finetune.model.shapes import ModelShape

TaskName = Literal["legal", "medical", "creative"]


@dataclass(frozen=True)
class Task:
    """Rows of one domain: how many, and how they are trained on.

    Attributes:
        train_rows, test_rows: at most; drawn once for all runs.
        epochs: over the training rows.
    """

    train_rows: int
    test_rows: int
    epochs: int = 1


@dataclass(frozen=True)
class Setting:
    """How a base is adapted: what its recipe says where variants do not differ.

    Attributes:
        ranks: of attention and experts in the reference variant, whose parameters the others match.
        other_rates: learning rates tried on the first kinds with the first seed: is `learning_rate` fair to them?
        alphas: kept when a rank changes, so that the learning rate fits every rank alike (the update is scaled by
            alpha / rank).
    """

    model: str
    ranks: tuple[int, int]
    alphas: tuple[float, float]
    learning_rate: float
    micro_steps: int
    max_length: int
    activation_checkpointing: bool
    tasks: dict[TaskName, Task]
    other_rates: tuple[float, ...]


TINY = Setting(
    model="tiny", ranks=(16, 16), alphas=(32.0, 32.0), learning_rate=2e-3, micro_steps=1, max_length=2048,
    activation_checkpointing=False,
    tasks={"legal": Task(400, 100), "medical": Task(150, 100), "creative": Task(100, 40)}, other_rates=(1e-3, 5e-3),
)  # fmt: skip
LARGE = Setting(
    model="gpt_oss_20b", ranks=(16, 4), alphas=(32.0, 8.0), learning_rate=2e-4, micro_steps=4, max_length=4096,
    activation_checkpointing=True,
    tasks={"legal": Task(10**6, 10**6, 2), "medical": Task(10**6, 10**6, 2), "creative": Task(10**6, 10**6, 2)},
    other_rates=(1e-4, 4e-4),
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One kind of adapter.

    Attributes:
        name: as it stands in the table.
        attention, experts: ranks; 0 leaves them alone.
        router: mode.
        select: which experts.
        timed_by: name of a variant whose training time it gets, however many steps that is. None: equal rows.
        same_adapter: with `timed_by`, name of the variant with this adapter and equal rows: it says what a step takes.
        learning_rate: instead of the setting's.
    """

    name: str
    attention: int
    experts: int
    router: str = "frozen"
    select: str = "all"
    timed_by: str | None = None
    same_adapter: str | None = None
    learning_rate: float | None = None

    def overrides(self, setting: Setting) -> list[str]:
        """What the command line says of it."""
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
        if self.learning_rate is not None:
            words.append(f"trainer.learning_rate={self.learning_rate}")
        return words


@dataclass(frozen=True)
class Planned:
    """One run to make."""

    task: TaskName
    variant: Variant
    seed: int
    shuffled: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}, {self.variant.name}" + (", shuffled labels" if self.shuffled else "")


def variants(setting: Setting, shape: ModelShape) -> dict[str, Variant]:
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
    )  # fmt: skip
    named = {variant.name: variant for variant in found}
    reference = found[0].name
    timed = replace(
        found[1],
        name=f"attention only, equal parameters and time, r={equal_attention}",
        timed_by=reference,
        same_adapter=found[1].name,
    )
    return named | {timed.name: timed}


def num_parameters(shape: ModelShape, attention: int, experts: int) -> int:
    """Trained parameters of these ranks on every projection and every expert."""
    config = AdapterConfig(attention=AttentionAdapterConfig(rank=attention), experts=ExpertAdapterConfig(rank=experts))
    return sum(site.num_parameters for site in plan_sites(shape, config))


def plan(setting: Setting, shape: ModelShape, seeds: list[int]) -> list[Planned]:
    """All runs; what matters most first, so that a run that is cut short has whole comparisons to show."""
    kinds = list(variants(setting, shape).values())
    first, attention, experts = kinds[:3]
    tiers: list[list[tuple[TaskName, Variant, bool]]] = [
        [("legal", first, False), ("legal", attention, False), ("legal", first, True)],
        [("legal", experts, False)],
        [("creative", first, False), ("creative", attention, False), ("medical", first, False)],
        [("legal", kind, False) for kind in (kinds[5], *kinds[3:5], kinds[7], kinds[6], kinds[8])],
        [("creative", experts, False), ("medical", attention, False)],
    ]
    rates = [
        Planned("legal", replace(kind, name=f"{kind.name}, learning rate {rate:g}", learning_rate=rate), seeds[0])
        for rate in setting.other_rates
        for kind in (first, attention, experts)
    ]
    runs = [
        [Planned(task, variant, seed, shuffled) for seed in seeds for task, variant, shuffled in tier] for tier in tiers
    ]
    return [*runs[0], *runs[1], *rates, *runs[2], *runs[3], *runs[4]]
