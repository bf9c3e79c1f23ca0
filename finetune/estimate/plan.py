"""Settings proposed for given GPUs: fit first, with the cheapest changes; then speed, with what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.estimate.changes import Overrides, changes_that_fit, with_overrides
from finetune.estimate.fit import Budget, fit
from finetune.estimate.shapes import BaseShape

KINDS = ("ddp", "zero1", "zero2", "fsdp2")  # from fastest to smallest
FULL_BATCH_TOKENS = 16_384  # of a micro-step; beyond it the kernels' model gains little (bench/README.md)


@dataclass(frozen=True)
class Plan:
    """Proposed settings.

    Attributes:
        config: the recipe with them.
        overrides: what differs from the recipe; empty: nothing.
        reasons: a line each, why.
    """

    config: RunConfig
    overrides: Overrides
    reasons: tuple[str, ...]


def make_plan(config: RunConfig, base: BaseShape, budget: Budget, gpus: int) -> Plan | None:
    """Propose settings under which a recipe fits and runs well.

    Args:
        config: the recipe; its rows an optimiser step stay as they are, as far as they divide.
        base: its base's sizes.
        budget: of each GPU.
        gpus: how many.

    Returns:
        None if no known settings make it fit.
    """
    reasons: list[str] = []
    overrides = _distributed(config, base, budget, gpus, reasons)
    spread = _apply(config, overrides)
    needed = changes_that_fit(spread, base, budget)
    if needed is None:
        return None
    reasons += [f"{key}: needed to fit" for key in needed]
    overrides |= needed
    overrides |= _fill(_apply(config, overrides), base, budget, reasons)
    return Plan(_apply(config, overrides), overrides, tuple(reasons))


def _distributed(config: RunConfig, base: BaseShape, budget: Budget, gpus: int, reasons: list[str]) -> Overrides:
    """The fastest kind of training on several GPUs whose share fits, else the smallest."""
    if gpus == 1:
        return {}
    for kind in KINDS:
        overrides: Overrides = {
            "distributed.kind": kind,
            "distributed.num_processes": gpus,
            "trainer.gradient_accumulation_steps": max(1, round(config.trainer.gradient_accumulation_steps / gpus)),
        }
        spread = with_overrides(config, overrides)
        if spread is not None and (fit(spread, base, budget).fits or kind == KINDS[-1]):
            reasons.append(f"distributed.kind: {kind} is the fastest whose share of the memory fits")
            return overrides
    reasons.append("this version trains on one GPU; the others would be idle")
    return {}


def _fill(config: RunConfig, base: BaseShape, budget: Budget, reasons: list[str]) -> Overrides:
    """Larger micro-steps while they fit and are worth it, then no recomputation if that fits too."""
    chosen: Overrides = {}
    rows, gradient_accumulation_steps = config.trainer.micro_batch_size, config.trainer.gradient_accumulation_steps
    while gradient_accumulation_steps % 2 == 0 and 2 * rows * config.data.max_length <= FULL_BATCH_TOKENS:
        larger = {
            "trainer.micro_batch_size": 2 * rows,
            "trainer.gradient_accumulation_steps": gradient_accumulation_steps // 2,
        }
        if not _fits(config, chosen | larger, base, budget):
            break
        rows, gradient_accumulation_steps = 2 * rows, gradient_accumulation_steps // 2
        chosen |= larger
    if chosen:
        reasons.append(f"trainer.micro_batch_size: {rows * config.data.max_length:,} tokens at once, the same step")
    if config.trainer.activation_checkpointing and not _set_by(config, "trainer.activation_offload"):
        kept = {"trainer.activation_checkpointing": False}
        if _fits(config, chosen | kept, base, budget):
            chosen |= kept
            reasons.append("trainer.activation_checkpointing: everything fits, so nothing need be computed twice")
    return chosen


def _fits(config: RunConfig, overrides: Overrides, base: BaseShape, budget: Budget) -> bool:
    changed = with_overrides(config, overrides)
    return changed is not None and fit(changed, base, budget).fits


def _apply(config: RunConfig, overrides: Overrides) -> RunConfig:
    changed = with_overrides(config, overrides) if overrides else config
    assert changed is not None or not overrides
    return changed or config


def _set_by(config: RunConfig, key: str) -> Any:
    section: Any = config
    for name in key.split("."):
        section = getattr(section, name, False)
    return section
