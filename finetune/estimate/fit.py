"""Does it fit? Memory of a recipe against a budget, and the longest rows that would still fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune.config.schema import RunConfig
from finetune.estimate.inputs import StepShape, step_shape
from finetune.estimate.memory import CONTEXT_BYTES, MemoryEstimate, estimate_memory
from finetune.estimate.shapes import BaseFacts, BaseShape

GIB = 2**30
USABLE_BYTES_PER_GB = 84.0e9 / 80  # an "80 GB" card has 85.5e9 to 85.9e9 bytes, of which the driver keeps some
LENGTH_STEP = 256


@dataclass(frozen=True)
class Budget:
    """Memory that a run may take.

    Attributes:
        num_bytes: for weights, tensors, allocator and context.
        label: which device, in words.
        on_gpu: a GPU's, or a CPU's.
    """

    num_bytes: float
    label: str
    on_gpu: bool

    @classmethod
    def of_card(cls, gib: float) -> Budget:
        """A GPU that is sold as having so many GB."""
        usable = gib * USABLE_BYTES_PER_GB
        label = f'a GPU of "{gib:g} GB": {usable / 1e9:.1f}e9 bytes = {usable / GIB:.1f} GiB usable'
        return cls(usable, label, on_gpu=True)

    @classmethod
    def of_gpu(cls, name: str, total_bytes: int, free_bytes: int) -> Budget:
        """A GPU of this machine; this process's own context is already taken from what is free, so it is given back."""
        label = f"{name}: {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free"
        return cls(min(total_bytes, free_bytes + CONTEXT_BYTES), label, on_gpu=True)

    @classmethod
    def of_host(cls, available_bytes: int) -> Budget:
        """The memory of this machine, for a run on its CPU."""
        return cls(available_bytes, f"this machine's memory: {available_bytes / GIB:.1f} GiB available", on_gpu=False)


@dataclass(frozen=True)
class Fit:
    """A recipe's memory against a budget."""

    memory: MemoryEstimate
    budget: Budget

    @property
    def fits(self) -> bool:
        """Whether the estimated peak is within the budget."""
        return self.over_bytes <= 0

    @property
    def over_bytes(self) -> float:
        """Bytes beyond the budget; negative: to spare."""
        return self.memory.total_bytes - self.budget.num_bytes


def fit(config: RunConfig, base: BaseShape, budget: Budget) -> Fit:
    """Estimate a recipe's peak and compare it with a budget."""
    return Fit(estimate_memory(base, step_shape(config, base, on_gpu=budget.on_gpu)), budget)


def longest_rows(step: StepShape, facts: BaseFacts, budget: Budget) -> int:
    """Tokens in the longest rows that fit, all else as it is, in steps of 256; 0 if none does."""

    def fits(length: int) -> bool:
        longer = replace(step, row_tokens=length, longest_sample=length)
        return estimate_memory(facts.shape, longer).total_bytes <= budget.num_bytes

    low, high = 0, facts.shape.max_positions // LENGTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * LENGTH_STEP) else (low, middle - 1)
    return low * LENGTH_STEP
