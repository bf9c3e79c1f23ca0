"""Round a base's adapted experts with compensation, layer by layer, on calibration tokens.

Base + adapter is run over the calibration tokens with one layer in memory. In each layer gate_up is rounded on the
inputs it received, then down on the outputs of the rounded gate_up. Finished layers are kept beside the export with
their SHA-256, so that an interruption costs one layer; the inputs of a layer are computed again, which takes little
time compared with the rounding.

Shape legend: C experts in a chunk, D hidden, F expert width, K in features, N out features, R routed tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune import log
from finetune.adapters.attach import attach_layer
from finetune.adapters.store import AdapterFile
from finetune.arch import EXPERT_PROJECTIONS, experts_path
from finetune.config.schema import ModelConfig
from finetune.kernels.experts import LoraFactors, clamped_swiglu
from finetune.model.build import LayerStream
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import PUBLISHED_SIGMOID_GAIN
from finetune.model.open import choose_device, choose_dtype
from finetune.rounding import grid
from finetune.rounding.calibration import (
    Calibration,
    ExpertInputs,
    LayerInputs,
    calibration_config,
    check_belongs,
    choose_calibration,
    expert_inputs,
    moments,
)
from finetune.rounding.compensate import Rounded, Settings, compensate
from finetune.rounding.merge import Tally, checksum, dot
from finetune.rounding.probe import experts_at_once, rounding_seconds
from finetune.rounding.results import ROUNDED, ExpertReport, LayerResult, RoundedExperts

_EXPERTS_PER_CHUNK = 4  # dequantised at a time in the forward pass


def round_experts_ahead(
    checkpoint: Checkpoint,
    adapter: AdapterFile,
    out: Path,
    *,
    calibrate_on: str | None,
    run: Path | None,
    identity: str,
    key: str,
) -> RoundedExperts:
    """Round the adapted experts of a merge before its shards are written, whose layers have an order of their own.

    Args:
        checkpoint: the base, native.
        adapter: its experts' updates are added.
        out: the export's directory; the rounded layers are kept beside it until it is finished.
        calibrate_on: a run directory or a recipe, as the user gave it; None: the adapter's own run.
        run: that run, if the adapter belongs to one.
        identity: of the base.
        key: of the export.

    Raises:
        ConfigError: there is nothing to calibrate on.
        InputError: the calibration data are of another base, tokenizer or training set.
        CheckError: an expert's inputs are not finite.
    """
    config = calibration_config(calibrate_on, run)
    calibration, data = choose_calibration(config, checkpoint, config.export.calibration_tokens)
    check_belongs(calibrate_on, run, identity, data)
    settings = Settings()
    model = ModelConfig(path=str(checkpoint.directory))
    device = choose_device(model)
    text = "\n".join([key, calibration.fingerprint, str(asdict(settings)), device.type])
    rounded = RoundedExperts.beside(out, hashlib.sha256(text.encode()).hexdigest())
    round_layers(checkpoint, adapter, calibration, rounded, device, choose_dtype(model, device), settings)
    for line in rounded.describe():
        log.info(line)
    return rounded


def round_layers(
    checkpoint: Checkpoint,
    adapter: AdapterFile,
    calibration: Calibration,
    rounded: RoundedExperts,
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
) -> None:
    """Round the adapted experts of every layer that is not finished yet.

    Args:
        checkpoint: the base, native.
        adapter: its experts' updates are added.
        calibration: the tokens to minimise the error on.
        rounded: finished layers are added to it.
        device, dtype: of the computation, and of activations.
        settings: of the solver.

    Raises:
        CheckError: inputs of an expert are not finite.
    """
    wanted = sorted({site.layer for site in adapter.sites if site.name in EXPERT_PROJECTIONS})
    missing = [number for number in wanted if not rounded.has(number)]
    if not missing:
        return
    at_once = experts_at_once(checkpoint.arch, device)
    seconds = rounding_seconds(checkpoint.arch, len(missing), at_once, device, settings)
    log.info(
        f"compensated rounding: {len(missing)} layers x {checkpoint.arch.num_experts} experts, calibrated on "
        f"{calibration.num_tokens:,} training tokens; about {log.duration(seconds)} by a probe on this machine"
    )
    stream = LayerStream(checkpoint, device, dtype, _EXPERTS_PER_CHUNK)
    hidden = [stream.embed(batch.input_ids) for batch in calibration.batches]
    with log.Progress("rounding", missing[-1] + 1, "layers") as progress:
        for number in range(missing[-1] + 1):
            inputs = _run_layer(stream, number, hidden, calibration, adapter)
            if number in missing:
                factors = {name: found for name, found in adapter.layer(number).items() if name in EXPERT_PROJECTIONS}
                rounded.add(number, round_layer(checkpoint, number, factors, inputs, settings, at_once))
            progress.advance(details=rounded.progress(number))


def _run_layer(
    stream: LayerStream, number: int, hidden: list[Tensor], calibration: Calibration, adapter: AdapterFile
) -> LayerInputs:
    """Advance all batches (in `hidden`) through one layer with its adapter; returns its experts' inputs."""
    layer = stream.read(number)
    attach_layer(layer, adapter, number, stream.device)
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


@dataclass(frozen=True)
class _Chunk:
    """A range of one projection's experts: values and update [C, K, N], the update zero where none is wanted."""

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
        factors: of its adapted expert projections; the others are not changed.
        inputs: of its experts, from base + adapter.
        settings: of the solver.
        experts_at_once: solved together; memory grows with it, and nothing of the result depends on it but the order
            of sums.

    Raises:
        CheckError: inputs that are not finite.
    """
    result = LayerResult()
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in factors}
    for first in range(0, checkpoint.arch.num_experts, experts_at_once):
        last = min(first + experts_at_once, checkpoint.arch.num_experts)
        own = [expert_inputs(inputs, expert) for expert in range(first, last)]
        gate_up: tuple[Tensor, Tensor] | None = None  # values and bias that make the down projection's inputs
        for name in EXPERT_PROJECTIONS:
            path = experts_path(number, name)
            chunk = _read_chunk(checkpoint, path, factors.get(name), first, last, own[0].x.device)
            if name in factors:
                seen = _chunk_inputs(own, gate_up, checkpoint.arch.swiglu_limit)
                where = f"{path}, experts {first} to {last - 1}"
                rounded, bias = _round_chunk(chunk, seen, settings, where)
                blocks = grid.encode(rounded.values, rounded.scales, chunk.blocks, chunk.scales)
                parts[name].append((blocks, rounded.scales, bias))
                _record(result, chunk, rounded, bias, own)
                gate_up = (rounded.values, bias)
            else:
                gate_up = (chunk.values, chunk.bias)
    for name, found in parts.items():
        for end, tensors in zip(("_blocks", "_scales", "_bias"), zip(*found, strict=True), strict=True):
            result.tensors[experts_path(number, name) + end] = torch.cat(tensors).cpu().contiguous()
    return result


def _read_chunk(
    checkpoint: Checkpoint, name: str, factors: LoraFactors | None, first: int, last: int, device: torch.device
) -> _Chunk:
    blocks, scales, bias = (
        checkpoint.read_rows(name + end, first, last).to(device) for end in ("_blocks", "_scales", "_bias")
    )
    values = grid.values(blocks, scales)
    if factors is None:
        return _Chunk(name, first, blocks, scales, bias, values, values.new_zeros(()))
    a, b = factors.a[first:last].to(device), factors.b[first:last].to(device)
    update = (a.mT @ b.mT).mul_(factors.scale)
    return _Chunk(name, first, blocks, scales, bias, values, update)


def _chunk_inputs(
    own: list[ExpertInputs], gate_up: tuple[Tensor, Tensor] | None, limit: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [R, K] and their weights [R] of each expert: the layer's, or the outputs of gate_up (if given) on them."""
    for place, inputs in enumerate(own):
        x = inputs.x
        if gate_up is not None:
            values, bias = gate_up
            x = clamped_swiglu(x @ values[place] + bias[place].float(), limit, PUBLISHED_SIGMOID_GAIN)
        yield x, inputs.weights


def _round_chunk(
    chunk: _Chunk, seen: Iterator[tuple[Tensor, Tensor]], settings: Settings, where: str
) -> tuple[Rounded, Tensor]:
    """Rounded matrices, and biases bfloat16 [C, N] that absorb the mean error."""
    found = [moments(x, weights, where) for x, weights in seen]
    means, second = torch.stack([mean for mean, _ in found]), torch.stack([moment for _, moment in found])
    solved = second.diagonal(dim1=-2, dim2=-1).sum(-1) > 0  # not: no tokens, or inputs that never vary
    update = torch.where(solved[:, None, None], chunk.update, 0)
    rounded = compensate(chunk.values, chunk.scales, update, second, settings)
    missing = (means[:, None] @ (chunk.values + chunk.update - rounded.values))[:, 0]
    bias = torch.where(missing == 0, chunk.bias, (chunk.bias.float() + missing).to(chunk.bias.dtype))
    return rounded, bias


def _record(result: LayerResult, chunk: _Chunk, rounded: Rounded, bias: Tensor, own: list[ExpertInputs]) -> None:
    """Add a chunk's sums and reports to the layer's."""
    change = rounded.values - chunk.values
    left = change - chunk.update
    tally = Tally(
        wanted=dot(chunk.update, chunk.update),
        kept=dot(change, chunk.update),
        missed=dot(left, left),
        weights=dot(chunk.values, chunk.values),
        changed=int(change.count_nonzero()),
        values=change.numel(),
        checksum=checksum(rounded.values.mT, chunk.first),
    )
    result.tallies.setdefault(chunk.name + "_blocks", Tally()).add(tally)
    old = chunk.bias.float()
    shift = bias.float() - old
    shifts = Tally(wanted=dot(shift, shift), weights=dot(old, old), values=shift.numel())
    result.tallies.setdefault(chunk.name + "_bias", Tally()).add(shifts)
    reports = result.experts.setdefault(chunk.name, [])
    reports += [_report(chunk, rounded, inputs, place) for place, inputs in enumerate(own)]


def _report(chunk: _Chunk, rounded: Rounded, inputs: ExpertInputs, place: int) -> ExpertReport:
    expert, tokens = chunk.first + place, inputs.num_own
    if not bool(chunk.update[place].any()):
        return ExpertReport(expert=expert, tokens=tokens, state="untouched: no update")
    if tokens == 0:
        return ExpertReport(expert=expert, tokens=tokens, state="untouched: no calibration token reached it")
    if not bool(rounded.wanted[place] > 0):
        return ExpertReport(expert=expert, tokens=tokens, state="untouched: no input excites its update")
    return ExpertReport(
        expert=expert,
        tokens=tokens,
        state=ROUNDED,
        borrowed=tokens < inputs.x.shape[1],
        singular=bool(rounded.singular[place]),
        wanted=float(rounded.wanted[place]) * inputs.mass,
        amplification=float(rounded.amplification[place]),
        projection=float(rounded.projection[place]),
        error=float(rounded.error[place]),
    )
