"""Round one layer's experts: gate_up on what they received, then down on what the rounded gate_up makes of it.

Shape legend: C experts in a chunk, D hidden, F expert width, K in features, N out features, R routed rows.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune import log
from finetune.adapters.attach import attach_layer
from finetune.adapters.layout import EXPERTS
from finetune.config.schema import ModelConfig
from finetune.export.options import ExportOptions
from finetune.export.plan import MergePlan
from finetune.files import sha256_of
from finetune.kernels.experts import LoraFactors, clamped_swiglu
from finetune.model.build import LayerStream
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import PUBLISHED_SIGMOID_GAIN
from finetune.model.open import choose_device, choose_dtype
from finetune.rounding import grid
from finetune.rounding.calibration import (
    Calibration,
    ExpertRows,
    LayerInputs,
    calibration_config,
    check_belongs,
    choose_rows,
    expert_rows,
    moments,
)
from finetune.rounding.compensate import Rounded, Settings, compensate
from finetune.rounding.merge import Tally, checksum
from finetune.rounding.probe import experts_at_once, rounding_seconds
from finetune.staging import Staging

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
    factors: dict[str, LoraFactors],
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
    for first in range(0, checkpoint.arch.num_experts, experts_at_once):
        last = min(first + experts_at_once, checkpoint.arch.num_experts)
        rows = [expert_rows(inputs, expert) for expert in range(first, last)]
        gate_up: tuple[Tensor, Tensor] | None = None  # values and bias as the down projection's inputs are made with
        for name in PROJECTIONS:
            chunk = _read_chunk(checkpoint, prefix + name, factors.get(name), first, last, rows)
            if name in factors:
                where = f"{prefix}{name}, experts {first} to {last - 1}"
                seen = _inputs_of(rows, gate_up, checkpoint.arch.swiglu_limit)
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
    checkpoint: Checkpoint, name: str, factors: LoraFactors | None, first: int, last: int, rows: list[ExpertRows]
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


# Round a whole base layer by layer: base + adapter is run over the calibration rows with one layer in memory.
#
# Finished layers are kept beside the export with their sha256, so that an interruption costs one layer; what a layer
# receives is computed again, which is quick beside the rounding.

_EXPERTS_PER_CHUNK = 4  # dequantised at a time in the forward pass


@dataclass(frozen=True)
class RoundedExperts:
    """Rounded tensors, in files of their own until the export has them.

    Attributes:
        staging: where they lie, a file a layer.
        tallies: sums over the weights, by the name of the blocks.
        experts: what became of each expert, by projection (see `finetune.rounding.run`).
    """

    staging: Staging
    tallies: dict[str, Tally]
    experts: dict[str, list[dict[str, Any]]]

    def read(self, name: str) -> Tensor:
        """A tensor under its name in the checkpoint."""
        return self._file(name).get_tensor(name)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Some experts of a tensor."""
        return self._file(name).get_slice(name)[first:last]

    def _file(self, name: str) -> Any:
        return safe_open(self.staging.path / _file_name(int(name.split(".")[2])), framework="pt")

    def discard(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.staging.path, ignore_errors=True)


def rounding_staging(out: Path, key: str) -> Staging:
    """Where the rounded layers of an export to `out` are kept."""
    return Staging(out.with_name(f"{out.name}.rounded"), key)


def round_experts_by_layer(
    plan: MergePlan,
    calibration: Calibration,
    staging: Staging,
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
) -> RoundedExperts:
    """Round every adapted expert of a plan.

    Args:
        plan: of a native checkpoint.
        calibration: rows to calibrate on.
        staging: see `rounding_staging`.
        device, dtype: where, and of activations.
        settings: of the solver.

    Raises:
        CheckError: inputs of an expert are not finite.
    """
    checkpoint, source = plan.checkpoint, plan.adapter
    wanted = sorted({site.layer for site in source.sites if site.name in EXPERTS})
    missing = [number for number in wanted if _file_name(number) not in staging.shards]
    if missing:
        at_once = experts_at_once(checkpoint.arch, device)
        log.info(
            _announcement(plan, calibration, len(missing), rounding_seconds(plan, missing, at_once, device, settings))
        )
        stream = LayerStream(checkpoint, device, dtype, _EXPERTS_PER_CHUNK)
        hidden = [stream.embed(batch.input_ids) for batch in calibration.batches]
        with log.Progress("rounding", missing[-1] + 1, "layers") as progress:
            for number in range(missing[-1] + 1):
                inputs = _through_layer(stream, number, hidden, calibration, plan)
                if number in missing:
                    factors = {name: found for name, found in source.layer(number).items() if name in EXPERTS}
                    result = round_layer(checkpoint, number, factors, inputs, settings, at_once)
                    _keep(staging, number, result.tensors, result.facts())
                progress.advance(details=_details(staging, number))
    facts = [staging.shards[_file_name(number)] for number in wanted]
    tallies = {name: Tally(**sums) for layer in facts for name, sums in layer["tallies"].items()}
    experts = {name: reports for layer in facts for name, reports in layer["experts"].items()}
    return RoundedExperts(staging, tallies, experts)


def _through_layer(
    stream: LayerStream, number: int, hidden: list[Tensor], calibration: Calibration, plan: MergePlan
) -> LayerInputs:
    """Move all rows through one layer with its adapter; what its experts received."""
    layer = stream.read(number)
    attach_layer(layer, plan.adapter, number, stream.device)
    received: list[tuple[Tensor, ...]] = []

    def remember(_module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        received.append(inputs)

    handle = layer.mlp.experts.register_forward_pre_hook(remember)
    for place, batch in enumerate(calibration.batches):
        hidden[place] = stream.run(layer, number, hidden[place], batch.positions, batch.segments)
        real = (batch.segments.reshape(-1) >= 0).to(stream.device)
        received[place] = tuple(tensor[real] for tensor in received[place])
    handle.remove()
    return LayerInputs(*(torch.cat(tensors) for tensors in zip(*received, strict=True)))


def _keep(staging: Staging, number: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    name = _file_name(number)
    save_file(tensors, staging.half(name))
    staging.finish_shard(name, {"sha256": sha256_of(staging.half(name))} | facts)


def _file_name(number: int) -> str:
    return f"layer-{number:03d}.safetensors"


def _details(staging: Staging, number: int) -> str:
    facts = staging.shards.get(_file_name(number))
    if facts is None:
        return f"layer {number}"
    done = [expert for reports in facts["experts"].values() for expert in reports if expert["state"] == "rounded"]
    mean = sum(expert["projection"] for expert in done) / max(1, len(done))
    return f"layer {number}: mean projection {mean:.3f} of {len(done)} expert matrices"


def _announcement(plan: MergePlan, calibration: Calibration, layers: int, seconds: float) -> str:
    return (
        f"compensated rounding: {layers} layers x {plan.checkpoint.arch.num_experts} experts, calibrated on "
        f"{calibration.num_tokens:,} training tokens; about {log.duration(seconds)} by a probe on this machine"
    )


# From what the command line asks for to rounded experts: which rounding, which rows, on which device.


def round_ahead(
    plan: MergePlan, out: Path, options: ExportOptions, run: Path | None, identity: str, key: str
) -> RoundedExperts | None:
    """Round the experts before anything is written, where they are compensated.

    Args:
        plan: what to merge.
        out: the export's directory; the rounded layers lie beside it until it is done.
        options: what the command line asked for.
        run: the adapter's run, if it belongs to one.
        identity: of the base.
        key: of the export.

    Returns:
        The rounded experts; None for other roundings, which are done while writing.

    Raises:
        ConfigError: there are no rows to calibrate on.
        InputError: they are of another base, tokenizer or training set.
        CheckError: an expert's inputs are not finite.
    """
    if plan.rounding != "compensated":
        return None
    config = calibration_config(options.calibration, run)
    calibration, data = choose_rows(config, plan.checkpoint, config.export.calibration_tokens)
    check_belongs(options.calibration, run, identity, data)
    settings = Settings()
    where = ModelConfig(path=str(plan.checkpoint.directory))
    device = choose_device(where)
    text = "\n".join([key, calibration.fingerprint, str(asdict(settings)), device.type])
    staging = rounding_staging(out, hashlib.sha256(text.encode()).hexdigest())
    rounded = round_experts_by_layer(plan, calibration, staging, device, choose_dtype(where, device), settings)
    for line in describe_experts(rounded):
        log.info(line)
    return rounded


def describe_experts(rounded: RoundedExperts) -> list[str]:
    """What became of experts that were not rounded as a matter of course, by name."""
    lines = []
    for name, reports in rounded.experts.items():
        kinds: dict[str, list[int]] = {}
        for report in reports:
            if report["state"] != "rounded":
                kinds.setdefault(report["state"], []).append(report["expert"])
            elif report["singular"]:
                kinds.setdefault("rounded with more damping: singular moments", []).append(report["expert"])
            elif report["borrowed"]:
                kinds.setdefault("rounded with moments shrunk to the layer's: few rows", []).append(report["expert"])
        lines += [f"{name}: {kind}: experts {', '.join(map(str, numbers))}" for kind, numbers in kinds.items()]
    return lines
