"""Round a whole base layer by layer: base + adapter is run over the calibration rows with one layer in memory.

Finished layers are kept beside the export with their sha256, so that an interruption costs one layer; what a layer
receives is computed again, which is quick beside the rounding.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune import log
from finetune.digest import sha256_of
from finetune.export.live import attach_layer
from finetune.export.merge import Tally
from finetune.export.plan import MergePlan
from finetune.export.rounding.calibration import Calibration
from finetune.export.rounding.compensate import Settings
from finetune.export.rounding.estimate import experts_at_once, rounding_seconds
from finetune.export.rounding.layer import round_layer
from finetune.export.rounding.moments import LayerInputs
from finetune.export.source import EXPERTS
from finetune.export.staging import Staging
from finetune.model.layerwise import LayerStream

_EXPERTS_PER_CHUNK = 4  # dequantised at a time in the forward pass


@dataclass(frozen=True)
class RoundedExperts:
    """Rounded tensors, in files of their own until the export has them.

    Attributes:
        staging: where they lie, a file a layer.
        tallies: sums over the weights, by the name of the blocks.
        experts: what became of each expert, by projection (see `finetune.export.rounding.layer`).
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
    checkpoint, source = plan.checkpoint, plan.source
    wanted = sorted({site.layer for site in source.sites if site.name in EXPERTS})
    missing = [number for number in wanted if _file_name(number) not in staging.shards]
    if missing:
        at_once = experts_at_once(checkpoint.shape, device)
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
    attach_layer(layer, plan.source, number, stream.device)
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
        f"compensated rounding: {layers} layers x {plan.checkpoint.shape.num_experts} experts, calibrated on "
        f"{calibration.num_tokens:,} training tokens; about {log.duration(seconds)} by a probe on this machine"
    )
