"""An estimate as text for a person, and as plain data for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune import log
from finetune.estimate.changes import Change, Overrides, as_text
from finetune.estimate.fit import GIB, Fit
from finetune.estimate.memory import MemoryEstimate
from finetune.estimate.parts import Part
from finetune.estimate.plan import Plan
from finetune.estimate.shapes import BaseFacts
from finetune.estimate.speed import TimeEstimate


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Everything that `finetune estimate` says of a recipe.

    Attributes:
        recipe: its name.
        facts: its base.
        fit: memory of the device against a budget.
        host, disk: parts outside the device; `host` is empty for a run on a CPU.
        time: of an optimiser step; None on a CPU.
        longest_rows: tokens in the longest rows that fit.
        kinds: peak by kind of distributed training, for several GPUs.
        changes: the cheapest ones, if it does not fit.
        enough: changes after which it fits; None: none are known.
        plan: proposed settings, if asked for.
    """

    recipe: str
    facts: BaseFacts
    fit: Fit
    host: Sequence[Part]
    disk: Sequence[Part]
    time: TimeEstimate | None
    longest_rows: int
    kinds: Mapping[str, float]
    changes: Sequence[Change]
    enough: Overrides | None
    plan: Plan | None


def describe(estimate: Estimate) -> str:
    """The whole of it, part by part."""
    memory = estimate.fit.memory
    sections = [
        [f"{estimate.recipe}: {estimate.facts.name}, sizes from {estimate.facts.source}"],
        [f"memory at the peak ({memory.peak_moment}), estimated:", *memory_lines(memory)],
        [verdict(estimate.fit), f"longest rows that fit, all else as it is: {estimate.longest_rows:,} tokens"],
        [*kind_lines(estimate.kinds)],
        ["host memory of a process:", *part_lines(estimate.host)] if estimate.host else [],
        ["disk:", *part_lines(estimate.disk, total=False)],
        time_lines(estimate.time) if estimate.time else [],
        [] if estimate.fit.fits else change_lines(estimate.changes, estimate.enough),
        plan_lines(estimate.plan) if estimate.plan else [],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def memory_lines(memory: MemoryEstimate) -> list[str]:
    """A line for each part: its GiB at the peak, or at its own moment when it is not alive at the peak."""
    lines = part_lines([part for part in memory.at_peak() if part.num_bytes >= 1])
    there = {part.name for part in memory.at_peak()}
    for moment, parts in memory.moments.items():
        for part in parts:
            if part.name not in there and part.num_bytes >= 1:
                there.add(part.name)
                lines.append(f"  ({_gib(part.num_bytes)})  {part.name}, at another moment: {moment}")
    return lines


def part_lines(parts: Iterable[Part], *, total: bool = True) -> list[str]:
    """A line for each part, and their sum."""
    lines = [
        f"  {_gib(part.num_bytes)} GiB  {part.name}" + (f" ({part.detail})" if part.detail else "") for part in parts
    ]
    return [*lines, f"  {_gib(sum(part.num_bytes for part in parts))} GiB  in all"] if total else lines


def verdict(fit: Fit) -> str:
    """One line: does it fit, into what, with how much to spare."""
    needed, spare = fit.memory.total_bytes, -fit.over_bytes
    how = f"fits, {spare / GIB:.1f} GiB to spare" if fit.fits else f"does not fit: {-spare / GIB:.1f} GiB too much"
    return f"{needed / GIB:.1f} GiB ({needed / 1e9:.1f}e9 bytes) {how}; {fit.budget.label}"


def change_lines(changes: Sequence[Change], enough: Overrides | None) -> list[str]:
    """The cheapest changes with what each saves, and a set of them that is enough ({}: none to be named)."""
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
    """The same as plain data; sizes in bytes."""
    memory, time = estimate.fit.memory, estimate.time
    return {
        "recipe": estimate.recipe,
        "base": estimate.facts.name,
        "fits": estimate.fit.fits,
        "budget": {"bytes": round(estimate.fit.budget.num_bytes), "device": estimate.fit.budget.label},
        "peak_bytes": round(memory.total_bytes),
        "peak_moment": memory.peak_moment,
        "parts": _data(memory.at_peak()),
        "moments": {name: _data(parts) for name, parts in memory.moments.items()},
        "longest_rows": estimate.longest_rows,
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


def _data(parts: Iterable[Part]) -> dict[str, int]:
    return {part.name: round(part.num_bytes) for part in parts}


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:8.3f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else log.duration(seconds)
