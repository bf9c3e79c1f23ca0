"""How much of an update is left after rounding to MXFP4, tensor by tensor and overall."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from finetune.export.plan import MergePlan
from finetune.rounding.merge import Tally

Experts = Mapping[str, list[dict[str, Any]]]


def survival_figures(plan: MergePlan, tallies: Mapping[str, Tally], experts: Experts | None = None) -> dict[str, Any]:
    """Figures of the rounded tensors for export.json.

    Args:
        plan: what was written.
        tallies: sums over the weights, by the name of the blocks.
        experts: what compensated rounding says of each expert (see `finetune.rounding.run`); None: it was not.

    Returns:
        `tensors` by name and `overall`: `update` (norm relative to the weights'), `survival` (projection of the written
        change on the update, 1 is all), `error` (norm of the difference relative to the update's) and `changed` (share
        of values that moved). An update of zero has survival 1 and is left out of `overall`. With `experts` also
        `outputs`: `projection`, `error` and median `amplification` in the space of outputs on calibration rows, and
        each expert's own under `experts`.
    """
    overall, tensors = Tally(), {}
    for operation in plan.operations:
        if operation.kind != "round experts":
            continue
        tally = tallies[operation.name]
        overall.add(tally)
        name = operation.name.removesuffix("_blocks")
        tensors[name] = _figures(tally)
        if experts is not None:
            tensors[name] |= {"outputs": _in_outputs(experts[name]), "experts": experts[name]}
    facts: dict[str, Any] = {"rounding": plan.rounding, "tensors": tensors, "overall": _figures(overall)}
    if experts is not None:
        facts["overall"]["outputs"] = _in_outputs([report for reports in experts.values() for report in reports])
    return facts


def describe_survival(facts: Mapping[str, Any]) -> list[str]:
    """A table, the overall line, and what it means in plain words."""
    compensated = "outputs" in facts["overall"]
    width = max((len(name) for name in facts["tensors"]), default=0)
    head = f"{'expert tensor':{width}}   update  survives    error  values moved"
    lines = [head + ("   in outputs: survives  error  amplified" if compensated else "")]
    for name, figures in [*facts["tensors"].items(), ("overall", facts["overall"])]:
        line = (
            f"{name:{width}}  {figures['update']:7.2%}  {figures['survival']:8.1%}  {figures['error']:7.2f}  "
            f"{figures['changed']:12.2%}"
        )
        if compensated:
            seen = figures["outputs"]
            line += f"  {seen['projection']:21.1%}  {seen['error']:5.2f}  {seen['amplification']:8.2f}x"
        lines.append(line)
    meaning = (
        "update: its size relative to the weights. survives: the part of it that is in the file, 100 % is all of it."
    )
    return [*lines, meaning, _verdict(facts)]


def _verdict(facts: Mapping[str, Any]) -> str:
    overall = facts["overall"]
    if "outputs" in overall:
        seen = overall["outputs"]
        text = (
            f"compensated rounding: {seen['projection']:.1%} of the update survives in what the experts put out on "
            f"calibration rows, beside an error of {seen['error']:.2f} of it"
        )
        return text + (f"; {seen['untouched']} expert matrices were left untouched" if seen["untouched"] else "")
    if facts["rounding"] == "stochastic":
        return (
            "stochastic rounding keeps the update on average and buries it in noise "
            f"({overall['error']:.1f} times its own size in the weights)."
        )
    return (
        f"warning: nearest rounding erases small updates: {overall['survival']:.1%} of this one is left in the experts "
        "(attention is merged exactly). Serve `bf16`, or the adapter itself, to keep all of it."
    )


def _in_outputs(reports: list[dict[str, Any]]) -> dict[str, float]:
    """Projection and error of all experts together, each weighing what its update does to the layer's output."""
    done = [report for report in reports if report["state"] == "rounded"]
    wanted = sum(report["wanted"] for report in done)
    if not wanted:
        return {"projection": 1.0, "error": 0.0, "amplification": 1.0, "rounded": 0, "untouched": len(reports)}
    return {
        "projection": sum(report["wanted"] * report["projection"] for report in done) / wanted,
        "error": (sum(report["wanted"] * report["error"] ** 2 for report in done) / wanted) ** 0.5,
        "amplification": median(report["amplification"] for report in done),
        "rounded": len(done),
        "untouched": len(reports) - len(done),
    }


def _figures(tally: Tally) -> dict[str, Any]:
    return {
        "update": tally.update_size if tally.weights else 0.0,
        "survival": tally.survival,
        "error": tally.error,
        "changed": tally.changed / tally.values if tally.values else 0.0,
    }
