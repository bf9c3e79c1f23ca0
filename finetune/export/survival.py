"""How much of an update is left after rounding to MXFP4, tensor by tensor and overall."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.export.merge import Tally
from finetune.export.plan import MergePlan


def survival_facts(plan: MergePlan, tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """Figures of the rounded tensors for export.json.

    Returns:
        `tensors` by name and `overall`: `update` (norm relative to the weights'), `survival` (projection of the written
        change on the update, 1 is all), `error` (norm of the difference relative to the update's) and `changed` (share
        of values that moved). An update of zero has survival 1 and is left out of `overall`.
    """
    overall, tensors = Tally(), {}
    for operation in plan.operations:
        if operation.kind != "round experts":
            continue
        tally = tallies[operation.name]
        overall.add(tally)
        tensors[operation.name.removesuffix("_blocks")] = _figures(tally)
    return {"tensors": tensors, "overall": _figures(overall)}


def describe_survival(facts: Mapping[str, Any]) -> list[str]:
    """A table, the overall line, and what it means in plain words."""
    width = max((len(name) for name in facts["tensors"]), default=0)
    lines = [f"{'expert tensor':{width}}   update  survives    error  values moved"]
    for name, figures in [*facts["tensors"].items(), ("overall", facts["overall"])]:
        lines.append(
            f"{name:{width}}  {figures['update']:7.2%}  {figures['survival']:8.1%}  {figures['error']:7.2f}  "
            f"{figures['changed']:12.2%}"
        )
    overall = facts["overall"]
    lines += [
        "update: its size relative to the weights. survives: the part of it that is in the file, 100 % is all of it.",
        f"warning: nearest rounding erases small updates: {overall['survival']:.1%} of this one is left in the experts "
        "(attention is merged exactly). Serve `bf16`, or the adapter itself, to keep all of it.",
    ]
    return lines


def _figures(tally: Tally) -> dict[str, float]:
    return {
        "update": tally.update_size if tally.weights else 0.0,
        "survival": tally.survival,
        "error": tally.error,
        "changed": tally.changed / tally.values if tally.values else 0.0,
    }
