"""The share of an update that survives rounding to MXFP4, counted in the weights, per tensor and overall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from finetune.export.plan import MergePlan
from finetune.export.record import Skipped
from finetune.export.survival.effect import Effect
from finetune.rounding.merge import Tally
from finetune.rounding.results import ExpertReport

ExpertReports = Sequence[ExpertReport]


@dataclass(frozen=True)
class OutputSurvival:
    """An update in the space of outputs on calibration tokens, all rounded experts together.

    Attributes:
        projection: of the written change on the update; 1 is all.
        error: norm of the difference relative to the update's.
        amplification: median factor by which the update was enlarged before rounding.
        rounded, untouched: numbers of expert matrices.
    """

    projection: float
    error: float
    amplification: float
    rounded: int
    untouched: int


@dataclass(frozen=True)
class TensorSurvival:
    """One tensor's update, or all of them together.

    Attributes:
        update: norm relative to the weights'.
        survival: projection of the written change on the update; 1 is all of it, and so is an update of zero.
        error: norm of the difference relative to the update's.
        changed: share of values that moved.
        outputs: the same in outputs; None without compensation.
        experts: reports on each expert; None without compensation, and overall.
    """

    update: float
    survival: float
    error: float
    changed: float
    outputs: OutputSurvival | None = None
    experts: ExpertReports | None = None


@dataclass
class Survival:
    """Survival of a merge to MXFP4, for export.json and survival-TARGET.json.

    Attributes:
        rounding: that was used.
        tensors: by name.
        overall: all tensors but those without an update.
        end_to_end: measured on held-out examples, once it is.
    """

    rounding: str
    tensors: dict[str, TensorSurvival]
    overall: TensorSurvival
    end_to_end: Effect | Skipped | None = None


def weight_survival(
    plan: MergePlan, tallies: Mapping[str, Tally], experts: Mapping[str, ExpertReports] | None = None
) -> Survival:
    """Survival of the rounded tensors.

    Args:
        plan: what was written.
        tallies: sums over the weights, by the name of the blocks.
        experts: reports of compensated rounding by projection; None: another rounding.
    """
    total, tensors = Tally(), {}
    for operation in plan.operations:
        if operation.kind == "round experts":
            tally = tallies[operation.name]
            total.add(tally)
            name = operation.name.removesuffix("_blocks")
            tensors[name] = _survival(tally, experts[name] if experts is not None else None)
    overall = _survival(total)
    if experts is not None:
        reports = [report for reports in experts.values() for report in reports]
        overall = _survival(total, reports, keep_reports=False)
    return Survival(plan.rounding, tensors, overall)


def describe_survival(survival: Survival) -> list[str]:
    """A table, the overall line, and what it means in plain words."""
    width = max((len(name) for name in survival.tensors), default=0)
    head = f"{'expert tensor':{width}}   update  survives    error  values moved"
    lines = [head + ("   in outputs: survives  error  amplified" if survival.overall.outputs else "")]
    for name, found in [*survival.tensors.items(), ("overall", survival.overall)]:
        line = f"{name:{width}}  {found.update:7.2%}  {found.survival:8.1%}  {found.error:7.2f}  {found.changed:12.2%}"
        if seen := found.outputs:
            line += f"  {seen.projection:21.1%}  {seen.error:5.2f}  {seen.amplification:8.2f}x"
        lines.append(line)
    meaning = (
        "update: its size relative to the weights. survives: the part of it that is in the file, 100 % is all of it."
    )
    return [*lines, meaning, _verdict(survival)]


def _verdict(survival: Survival) -> str:
    overall = survival.overall
    if seen := overall.outputs:
        text = (
            f"compensated rounding: {seen.projection:.1%} of the update survives in the experts' outputs on "
            f"calibration tokens, with an error of {seen.error:.2f} of it"
        )
        return text + (f"; {seen.untouched} expert matrices were left untouched" if seen.untouched else "")
    if survival.rounding == "stochastic":
        return (
            "stochastic rounding keeps the update on average and buries it in noise "
            f"({overall.error:.1f} times its own size in the weights)."
        )
    return (
        f"warning: nearest rounding erases small updates: {overall.survival:.1%} of this one is left in the experts "
        "(attention is merged exactly). Serve `bf16`, or the adapter itself, to keep all of it."
    )


def _survival(tally: Tally, reports: ExpertReports | None = None, *, keep_reports: bool = True) -> TensorSurvival:
    return TensorSurvival(
        update=tally.update_size if tally.weights else 0.0,
        survival=tally.survival,
        error=tally.error,
        changed=tally.changed / tally.values if tally.values else 0.0,
        outputs=None if reports is None else _in_outputs(reports),
        experts=reports if keep_reports else None,
    )


def _in_outputs(reports: ExpertReports) -> OutputSurvival:
    """Projection and error of all experts together, each weighted by its update's effect on the layer's output."""
    done = [report for report in reports if report.is_rounded]
    wanted = sum(report.wanted for report in done)
    if not wanted:
        return OutputSurvival(1.0, 0.0, 1.0, 0, len(reports))
    return OutputSurvival(
        projection=sum(report.wanted * report.projection for report in done) / wanted,
        error=(sum(report.wanted * report.error**2 for report in done) / wanted) ** 0.5,
        amplification=median(report.amplification for report in done),
        rounded=len(done),
        untouched=len(reports) - len(done),
    )
