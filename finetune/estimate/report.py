"""All of an estimate, put together for a recipe."""

from __future__ import annotations

from finetune.config.schema import RunConfig
from finetune.estimate.changes import changes_that_fit, cheapest_changes, with_overrides
from finetune.estimate.fit import Budget, fit, longest_rows
from finetune.estimate.inputs import step_shape
from finetune.estimate.plan import KINDS, make_plan
from finetune.estimate.shapes import BaseFacts
from finetune.estimate.speed import H100_TFLOPS, estimate_time
from finetune.estimate.storage import disk_parts, host_parts
from finetune.estimate.text import Estimate


def make_estimate(
    config: RunConfig,
    recipe: str,
    facts: BaseFacts,
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
        facts: its base.
        budget: of the device, or of each of several.
        gpus: how many.
        plan: propose settings too.
        tflops: the GPU's bfloat16 peak. None: an H100's.
    """
    base, on_gpu = facts.shape, budget.on_gpu
    step, result = step_shape(config, base, on_gpu=on_gpu), fit(config, base, budget)
    return Estimate(
        recipe=recipe,
        facts=facts,
        fit=result,
        host=host_parts(base, step) if on_gpu else (),
        disk=disk_parts(facts, config, step),
        time=estimate_time(base, step, tflops or H100_TFLOPS) if on_gpu else None,
        longest_rows=longest_rows(step, facts, budget),
        kinds=_kinds(config, facts, budget, gpus) if gpus > 1 else {},
        changes=() if result.fits else cheapest_changes(config, base, budget),
        enough={} if result.fits else changes_that_fit(config, base, budget),
        plan=make_plan(config, base, budget, gpus) if plan else None,
    )


def _kinds(config: RunConfig, facts: BaseFacts, budget: Budget, gpus: int) -> dict[str, float]:
    """Peak of each GPU, in bytes, by kind of distributed training that this version has."""
    peaks = {}
    for kind in ("single", *KINDS, "zero3"):
        processes = 1 if kind == "single" else gpus
        changed = with_overrides(config, {"distributed.kind": kind, "distributed.num_processes": processes})
        if kind == config.distributed.kind or changed is not None:
            peaks[kind] = fit(changed or config, facts.shape, budget).memory.total_bytes
    return peaks
