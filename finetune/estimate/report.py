"""The estimate of a recipe: put together, as text for a terminal, and as plain data for `--json`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune import log
from finetune.config.schema import RunConfig
from finetune.estimate.advice import (
    KINDS,
    Change,
    Overrides,
    Plan,
    as_text,
    changes_that_fit,
    cheapest_changes,
    make_plan,
    with_overrides,
)
from finetune.estimate.fit import (
    GIB,
    H100_TFLOPS,
    Budget,
    Fit,
    TimeEstimate,
    disk_parts,
    estimate_time,
    fit,
    host_parts,
    longest_sequences,
)
from finetune.estimate.inputs import BaseInfo, step_profile
from finetune.estimate.memory import FROZEN, MemoryEstimate, NamedBytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Everything that `finetune estimate` prints about a recipe.

    Attributes:
        recipe: its name.
        base: its base.
        fit: memory of the device against a budget.
        host, disk: sizes outside the device; `host` is empty for a run on a CPU.
        time: of an optimiser step; None on a CPU.
        longest_sequences: tokens in the longest sequences that fit.
        kinds: peak by kind of distributed training, for several GPUs.
        changes: the cheapest ones, if it does not fit.
        enough: changes with which it fits; None: none are known.
        plan: proposed settings, if asked for.
    """

    recipe: str
    base: BaseInfo
    fit: Fit
    host: Sequence[NamedBytes]
    disk: Sequence[NamedBytes]
    time: TimeEstimate | None
    longest_sequences: int
    kinds: Mapping[str, float]
    changes: Sequence[Change]
    enough: Overrides | None
    plan: Plan | None


def make_estimate(
    config: RunConfig,
    recipe: str,
    base: BaseInfo,
    budget: Budget,
    *,
    gpus: int = 1,
    plan: bool = False,
    tflops: float | None = None,
) -> Estimate:
    """Estimate a recipe.

    Args:
        config: the checked recipe.
        recipe: its name.
        base: its base.
        budget: of the device, or of each of several.
        gpus: how many.
        plan: propose settings too.
        tflops: the GPU's bfloat16 peak. None: an H100's.
    """
    arch, on_gpu = base.arch, budget.on_gpu
    step, result = step_profile(config, arch, on_gpu=on_gpu), fit(config, arch, budget)
    return Estimate(
        recipe=recipe,
        base=base,
        fit=result,
        host=host_parts(arch, step) if on_gpu else (),
        disk=disk_parts(base, config, step),
        time=estimate_time(arch, step, tflops or H100_TFLOPS) if on_gpu else None,
        longest_sequences=longest_sequences(step, arch, budget),
        kinds=_kinds(config, base, budget, gpus) if gpus > 1 else {},
        changes=() if result.fits else cheapest_changes(config, arch, budget),
        enough={} if result.fits else changes_that_fit(config, arch, budget),
        plan=make_plan(config, arch, budget, gpus) if plan else None,
    )


def _kinds(config: RunConfig, base: BaseInfo, budget: Budget, gpus: int) -> dict[str, float]:
    """Peak of each GPU, in bytes, by kind of distributed training that this version has."""
    peaks = {}
    for kind in ("single", *KINDS, "zero3"):
        ranks = 1 if kind == "single" else gpus
        changed = with_overrides(config, {"distributed.kind": kind, "distributed.num_processes": ranks})
        if kind == config.distributed.kind or changed is not None:
            peaks[kind] = fit(changed or config, base.arch, budget).memory.total_bytes
    return peaks


def describe(estimate: Estimate) -> str:
    """The whole estimate as text, section by section."""
    memory = estimate.fit.memory
    longest = f"{estimate.longest_sequences:,} tokens"
    sections = [
        [f"{estimate.recipe}: {estimate.base.name}, sizes from {estimate.base.source}", *base_lines(estimate)],
        [f"memory at the peak ({memory.peak_moment}), estimated:", *memory_lines(memory)],
        [verdict(estimate.fit), f"longest sequences that fit, all else unchanged: {longest}"],
        [*kind_lines(estimate.kinds)],
        ["host memory per process:", *part_lines(estimate.host)] if estimate.host else [],
        ["disk:", *part_lines(estimate.disk, total=False)],
        time_lines(estimate.time) if estimate.time else [],
        [] if estimate.fit.fits or base_lines(estimate) else change_lines(estimate.changes, estimate.enough),
        plan_lines(estimate.plan) if estimate.plan else [],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def base_lines(estimate: Estimate) -> list[str]:
    """That the frozen weights alone are too large, where they are: no setting of training helps then."""
    weights = sum(part.num_bytes for part in estimate.fit.memory.always if part.name in FROZEN)
    capacity = estimate.fit.memory.total_bytes - estimate.fit.over_bytes
    if weights <= capacity:
        return []
    cards = math.ceil(1.15 * weights / capacity)
    return [
        f"the frozen weights alone take {weights / GIB:.1f} GiB of the {capacity / GIB:.1f} GiB there are: no setting "
        f"makes it fit on one. Shard them over {cards} or more (distributed=fsdp2 distributed.num_processes={cards}), "
        "take a larger GPU, or a smaller base"
    ]


def memory_lines(memory: MemoryEstimate) -> list[str]:
    """One line per part: its GiB at the peak, or at its own moment when it is not allocated at the peak."""
    lines = part_lines([part for part in memory.at_peak() if part.num_bytes >= 1])
    listed = {part.name for part in memory.at_peak()}
    for moment, parts in memory.moments.items():
        for part in parts:
            if part.name not in listed and part.num_bytes >= 1:
                listed.add(part.name)
                lines.append(f"  ({_gib(part.num_bytes)})  {part.name}, at another moment: {moment}")
    return lines


def part_lines(parts: Iterable[NamedBytes], *, total: bool = True) -> list[str]:
    """One line per part, and their sum."""
    lines = [
        f"  {_gib(part.num_bytes)} GiB  {part.name}" + (f" ({part.detail})" if part.detail else "") for part in parts
    ]
    return [*lines, f"  {_gib(sum(part.num_bytes for part in parts))} GiB  in total"] if total else lines


def verdict(fit: Fit) -> str:
    """One line: whether it fits, into which memory, with how much to spare."""
    needed, spare = fit.memory.total_bytes, -fit.over_bytes
    how = f"fits, {spare / GIB:.1f} GiB to spare" if fit.fits else f"does not fit: {-spare / GIB:.1f} GiB too much"
    return f"{needed / GIB:.1f} GiB ({needed / 1e9:.1f}e9 bytes) {how}; {fit.budget.label}"


def change_lines(changes: Sequence[Change], enough: Overrides | None) -> list[str]:
    """The cheapest changes with what each saves, and a set of them that is enough ({}: none is to be named)."""
    lines = ["the cheapest changes, each alone:" if changes else "no single change known here saves much"]
    for change in changes:
        ending = ", and then it fits" if change.fits else ""
        lines.append(
            f"  {as_text(change.overrides)}\n      saves {change.saves_bytes / GIB:.2f} GiB{ending}; {change.costs}"
        )
    if enough is None:
        return [*lines, "no settings known here make it fit; a larger GPU or several (--gpus 2 --plan) would"]
    if enough and not any(change.fits for change in changes):
        lines.append(f"enough together: {as_text(enough)}")
    return lines


def kind_lines(kinds: Mapping[str, float]) -> list[str]:
    """Peak of each GPU by kind of distributed training."""
    lines = [f"  {_gib(num_bytes)} GiB  {kind}" for kind, num_bytes in kinds.items()]
    return ["memory of each GPU by distributed.kind:", *lines] if lines else []


def time_lines(time: TimeEstimate) -> list[str]:
    """Time of a step and of a million tokens, with the basis."""
    millions = 1e6 / time.tokens_per_step
    fast, slow = time.fast_seconds, time.slow_seconds
    return [
        f"time of an optimiser step ({time.tokens_per_step:,} tokens at most): {_seconds(fast)} to {_seconds(slow)}; "
        f"of a million tokens: {log.duration(fast * millions)} to {log.duration(slow * millions)}",
        f"  {time.basis}",
    ]


def plan_lines(plan: Plan) -> list[str]:
    """The proposed overrides and their reasons."""
    if not plan.overrides:
        return ["plan: the recipe as it is"]
    return [f"plan: {as_text(plan.overrides)}", *(f"  {reason}" for reason in plan.reasons)]


def as_data(estimate: Estimate) -> dict[str, Any]:
    """The estimate as plain data; sizes in bytes."""
    memory, time = estimate.fit.memory, estimate.time
    return {
        "recipe": estimate.recipe,
        "base": estimate.base.name,
        "fits": estimate.fit.fits,
        "budget": {"bytes": round(estimate.fit.budget.num_bytes), "device": estimate.fit.budget.label},
        "peak_bytes": round(memory.total_bytes),
        "peak_moment": memory.peak_moment,
        "parts": _data(memory.at_peak()),
        "moments": {name: _data(parts) for name, parts in memory.moments.items()},
        "longest_rows": estimate.longest_sequences,
        "kinds": {kind: round(num_bytes) for kind, num_bytes in estimate.kinds.items()},
        "host": _data(estimate.host),
        "disk": _data(estimate.disk),
        "time": None if time is None else {
            "seconds_per_step": [round(time.fast_seconds, 3), round(time.slow_seconds, 3)],
            "tokens_per_step": time.tokens_per_step,
            "flops_per_token": round(time.flops_per_token),
            "basis": time.basis,
        },
        "changes": [
            {"overrides": as_text(c.overrides), "saves_bytes": round(c.saves_bytes), "fits": c.fits, "costs": c.costs}
            for c in estimate.changes
        ],
        "enough": None if estimate.enough is None else as_text(estimate.enough),
        "plan": None if estimate.plan is None else as_text(estimate.plan.overrides),
    }  # fmt: skip


def _data(parts: Iterable[NamedBytes]) -> dict[str, int]:
    return {part.name: round(part.num_bytes) for part in parts}


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:8.3f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else log.duration(seconds)
