"""Round one layer's experts: gate_up on what they received, then down on what the rounded gate_up makes of it.

Shape legend: C experts in a chunk, D hidden, F expert width, K in features, N out features, R routed rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from finetune.export.merge import Tally, checksum
from finetune.export.rounding import grid
from finetune.export.rounding.compensate import Rounded, Settings, compensate
from finetune.export.rounding.moments import ExpertRows, LayerInputs, expert_rows, moments
from finetune.export.source import Factors
from finetune.kernels.experts import clamped_swiglu
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import PUBLISHED_SIGMOID_GAIN

PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass
class LayerResult:
    """What a layer's experts became.

    Attributes:
        tensors: by their names in the checkpoint: `..._blocks`, `..._scales`, `..._bias` of each projection with an
            update.
        tallies: sums over the weights by the name of the blocks, and over the biases by theirs (`wanted`: how far
            they were moved).
        experts: for each projection, by its name, what became of each expert (see `_report`).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    experts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Plain data without the tensors."""
        return {"tallies": {name: asdict(tally) for name, tally in self.tallies.items()}, "experts": self.experts}


@dataclass(frozen=True)
class _Chunk:
    """A range of one projection's experts: values [C, K, N] and update [C, K, N] (zero where nothing is to be done)."""

    name: str
    first: int
    blocks: Tensor
    scales: Tensor
    bias: Tensor
    values: Tensor
    update: Tensor


def round_layer(
    checkpoint: Checkpoint,
    number: int,
    factors: dict[str, Factors],
    inputs: LayerInputs,
    settings: Settings,
    experts_at_once: int,
) -> LayerResult:
    """Round the adapted projections of one layer.

    Args:
        checkpoint: the base.
        number: of the layer.
        factors: of its adapted expert projections; the others stay as they are.
        inputs: what its experts received from base + adapter.
        settings: of the solver.
        experts_at_once: solved together; memory grows with it, and nothing of the result depends on it but the order
            of sums.

    Raises:
        CheckError: inputs that are not finite.
    """
    result = LayerResult()
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in factors}
    prefix = f"model.layers.{number}.mlp.experts."
    for first in range(0, checkpoint.shape.num_experts, experts_at_once):
        last = min(first + experts_at_once, checkpoint.shape.num_experts)
        rows = [expert_rows(inputs, expert) for expert in range(first, last)]
        gate_up: tuple[Tensor, Tensor] | None = None  # values and bias as the down projection's inputs are made with
        for name in PROJECTIONS:
            chunk = _read_chunk(checkpoint, prefix + name, factors.get(name), first, last, rows)
            if name in factors:
                where = f"{prefix}{name}, experts {first} to {last - 1}"
                seen = _inputs_of(rows, gate_up, checkpoint.shape.swiglu_limit)
                rounded, bias = _round_chunk(chunk, seen, settings, where)
                blocks = grid.encode(rounded.values, rounded.scales, chunk.blocks, chunk.scales)
                parts[name].append((blocks, rounded.scales, bias))
                _note(result, chunk, rounded, bias, rows)
                gate_up = (rounded.values, bias)
            else:
                gate_up = (chunk.values, chunk.bias)
    for name, found in parts.items():
        for end, tensors in zip(("_blocks", "_scales", "_bias"), zip(*found, strict=True), strict=True):
            result.tensors[prefix + name + end] = torch.cat(tensors).cpu().contiguous()
    return result


def _read_chunk(
    checkpoint: Checkpoint, name: str, factors: Factors | None, first: int, last: int, rows: list[ExpertRows]
) -> _Chunk:
    device = rows[0].x.device
    blocks, scales, bias = (
        checkpoint.read_rows(name + end, first, last).to(device) for end in ("_blocks", "_scales", "_bias")
    )
    values = grid.values(blocks, scales)
    if factors is None:
        return _Chunk(name, first, blocks, scales, bias, values, values.new_zeros(()))
    a, b = factors.a[first:last].to(device), factors.b[first:last].to(device)
    update = (a.mT @ b.mT).mul_(factors.scale)
    return _Chunk(name, first, blocks, scales, bias, values, update)


def _inputs_of(
    rows: list[ExpertRows], gate_up: tuple[Tensor, Tensor] | None, limit: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [R, K] and their weights [R], expert by expert: the layer's, or what gate_up (if given) makes of them."""
    for place, own in enumerate(rows):
        x = own.x
        if gate_up is not None:
            values, bias = gate_up
            x = clamped_swiglu(x @ values[place] + bias[place].float(), limit, PUBLISHED_SIGMOID_GAIN)
        yield x, own.weights


def _round_chunk(
    chunk: _Chunk, seen: Iterator[tuple[Tensor, Tensor]], settings: Settings, where: str
) -> tuple[Rounded, Tensor]:
    """Rounded matrices, and biases bfloat16 [C, N] that take up the mean of what is missing."""
    found = [moments(x, weights, where) for x, weights in seen]
    means, second = torch.stack([mean for mean, _ in found]), torch.stack([moment for _, moment in found])
    solved = second.diagonal(dim1=-2, dim2=-1).sum(-1) > 0  # not: no rows, or inputs that never vary
    update = torch.where(solved[:, None, None], chunk.update, 0)
    rounded = compensate(chunk.values, chunk.scales, update, second, settings)
    missing = (means[:, None] @ (chunk.values + chunk.update - rounded.values))[:, 0]
    bias = torch.where(missing == 0, chunk.bias, (chunk.bias.float() + missing).to(chunk.bias.dtype))
    return rounded, bias


def _note(result: LayerResult, chunk: _Chunk, rounded: Rounded, bias: Tensor, rows: list[ExpertRows]) -> None:
    change = rounded.values - chunk.values
    left = change - chunk.update
    tally = Tally(
        wanted=_dot(chunk.update, chunk.update),
        kept=_dot(change, chunk.update),
        missed=_dot(left, left),
        weights=_dot(chunk.values, chunk.values),
        changed=int(change.count_nonzero()),
        values=change.numel(),
        checksum=checksum(rounded.values.mT, chunk.first),
    )
    result.tallies.setdefault(chunk.name + "_blocks", Tally()).add(tally)
    shift = bias.float() - chunk.bias.float()
    shifts = Tally(
        wanted=_dot(shift, shift), weights=_dot(chunk.bias.float(), chunk.bias.float()), values=shift.numel()
    )
    result.tallies.setdefault(chunk.name + "_bias", Tally()).add(shifts)
    reports = result.experts.setdefault(chunk.name, [])
    for place, own in enumerate(rows):
        reports.append(_report(chunk, rounded, own, place))


def _report(chunk: _Chunk, rounded: Rounded, own: ExpertRows, place: int) -> dict[str, Any]:
    """One expert: its number, calibration rows, what was done, and in outputs: wanted size, projection, error."""
    facts: dict[str, Any] = {"expert": chunk.first + place, "rows": own.num_own}
    if not bool(chunk.update[place].any()):
        return facts | {"state": "untouched: no update"}
    if own.num_own == 0:
        return facts | {"state": "untouched: no calibration row reached it"}
    if not bool(rounded.wanted[place] > 0):
        return facts | {"state": "untouched: no input excites its update"}
    facts |= {"state": "rounded", "borrowed": own.num_own < own.x.shape[1], "singular": bool(rounded.singular[place])}
    return facts | {
        "wanted": float(rounded.wanted[place]) * own.mass,
        "amplification": float(rounded.amplification[place]),
        "projection": float(rounded.projection[place]),
        "error": float(rounded.error[place]),
    }


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dim=-1).double().sum())
