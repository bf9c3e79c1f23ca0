"""The plan of a merge, tensor by tensor, worked out from headers alone: no tensor is read and nothing is written.

A native checkpoint is planned in the base's own files, order and headers, so that an update of zero gives the same
bytes. A bfloat16 one gets files of its own, cut below 5 GB: an interruption costs at most one of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.adapters.layout import EXPERTS, StoredSite
from finetune.adapters.store import AdapterFile
from finetune.arch import DTYPE_BYTES
from finetune.errors import ConfigError
from finetune.export.base import check_fits
from finetune.export.options import DEFAULT_ROUNDING, ExportOptions, MergedTarget, Rounding
from finetune.model.checkpoint import Checkpoint
from finetune.mxfp4.format import BLOCK

SHARD_BYTES = 5_000_000_000  # what transformers cut at for years; smaller is only more files
Kind = Literal["copy", "merge", "bias", "dequantise", "merge experts", "round experts", "scales", "expert bias"]
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"
_KINDS: dict[str, Kind] = {_BLOCKS: "round experts", _SCALES: "scales", _BIAS: "expert bias", ".weight": "merge"}


@dataclass(frozen=True)
class Operation:
    """The operation that makes one tensor of the result.

    Attributes:
        kind: `copy` the base's bytes; `merge` a bfloat16 weight with its update; `bias` a router's bias with
            its change; `dequantise` experts as they are or `merge experts` with their update, into bfloat16
            [E, in, out]; `round experts` with their update to MXFP4 blocks, and write the `scales` found there and the
            `expert bias` that compensates their mean error.
        name: of the tensor in the result.
        base: of the tensor in the base (blocks, for experts).
        site: the update; None where there is none.
        dtype: as safetensors writes it.
        shape: its sizes.
    """

    kind: Kind
    name: str
    base: str
    site: StoredSite | None
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the result."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One file of the result.

    Attributes:
        file: its name.
        operations: its tensors, in the order of the data.
        like: the base's file whose header it takes byte for byte; None: a header of its own.
    """

    file: str
    operations: tuple[Operation, ...]
    like: str | None

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(operation.num_bytes for operation in self.operations)


@dataclass(frozen=True)
class MergePlan:
    """A merge: target, base, adapter, every file with every tensor in it, and how experts are rounded if they are."""

    target: MergedTarget
    checkpoint: Checkpoint
    adapter: AdapterFile
    shards: tuple[Shard, ...]
    rounding: Rounding = "nearest"

    @property
    def operations(self) -> list[Operation]:
        """All of them, file by file."""
        return [operation for shard in self.shards for operation in shard.operations]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(shard.num_bytes for shard in self.shards)

    def index(self) -> str:
        """The text of model.safetensors.index.json."""
        weight_map = {operation.name: shard.file for shard in self.shards for operation in shard.operations}
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(index, indent=2) + "\n"


def plan_merge(
    checkpoint: Checkpoint, adapter: AdapterFile, target: MergedTarget, rounding: Rounding = "nearest"
) -> MergePlan:
    """Plan a merged checkpoint.

    Args:
        checkpoint: the base.
        adapter: opened.
        target: `bf16` or `mxfp4`; `gguf` is planned as one of them and written by `finetune.export.targets.gguf`.
        rounding: of `mxfp4`; compensated rounding changes the experts' biases as well.

    Raises:
        InputError: the adapter does not fit the base's shapes.
    """
    check_fits(checkpoint.arch, adapter)
    if target == "mxfp4":
        shards = _native_shards(checkpoint, adapter, biases=rounding == "compensated")
    else:
        shards = _dense_shards(checkpoint, adapter)
    return MergePlan(target, checkpoint, adapter, shards, rounding)


def choose_rounding(layout: MergedTarget, adapter: AdapterFile, options: ExportOptions) -> Rounding:
    """The rounding of an export; `nearest`, which then has no effect, where no expert is rounded.

    Args:
        layout: how experts are stored: `bf16` or `mxfp4`.
        adapter: opened.
        options: of the command line.

    Raises:
        ConfigError: a rounding or a calibration is asked for that would do nothing.
    """
    rounds = layout == "mxfp4" and any(site.name in EXPERTS for site in adapter.sites)
    rounding = options.rounding or (DEFAULT_ROUNDING if rounds else "nearest")
    if options.rounding and not rounds:
        why = "experts stay in bfloat16" if layout != "mxfp4" else "the adapter changes no expert"
        raise ConfigError(f"--rounding {options.rounding} does nothing here: {why}", fix="leave it out")
    if options.calibration and rounding != "compensated":
        raise ConfigError(
            "--calibration is for compensated rounding alone", fix="leave it out, or ask for --rounding compensated"
        )
    return rounding


def describe_plan(plan: MergePlan) -> list[str]:
    """One line per tensor with its bytes, file by file, and the totals."""
    lines = []
    for shard in plan.shards:
        lines.append(f"{shard.file}  {shard.num_bytes:,} bytes")
        for operation in shard.operations:
            rank = (
                f"  rank {operation.site.rank}"
                if operation.site and operation.kind not in ("scales", "expert bias")
                else ""
            )
            sizes = "x".join(map(str, operation.shape))
            lines.append(
                f"  {operation.kind:<13} {operation.num_bytes:>15,}  {operation.name} {operation.dtype} {sizes}{rank}"
            )
    changed = sum(operation.num_bytes for operation in plan.operations if operation.site)
    lines.append(
        f"{len(plan.operations)} tensors in {len(plan.shards)} files, {plan.num_bytes:,} bytes, "
        f"{changed:,} of them changed by the adapter"
    )
    return lines


def _native_shards(checkpoint: Checkpoint, adapter: AdapterFile, *, biases: bool) -> tuple[Shard, ...]:
    sites = {site.module: site for site in adapter.sites}
    ends = (_BLOCKS, _SCALES, _BIAS, ".weight") if biases else (_BLOCKS, _SCALES, ".weight")
    by_file: dict[str, list[Operation]] = {}
    for name, entry in checkpoint.entries.items():
        end = next((end for end in ends if name.endswith(end)), "")
        site = sites.get(name.removesuffix(end)) if end else None
        kind: Kind = "copy"
        if site is not None:
            kind = _KINDS[end]
        elif name in adapter.router_bias:
            kind = "bias"
        base = name.removesuffix(_SCALES) + _BLOCKS if kind == "scales" else name
        by_file.setdefault(entry.file, []).append(Operation(kind, name, base, site, entry.dtype, entry.shape))
    shards = [Shard(file, tuple(operations), file) for file, operations in sorted(by_file.items())]
    if _scales_follow_blocks([operation.name for shard in shards for operation in shard.operations]):
        return tuple(shards)
    operations = {operation.name: operation for shard in shards for operation in shard.operations}
    return _cut([operations[name] for name in checkpoint.arch.expected_tensors()])


def _scales_follow_blocks(names: Sequence[str]) -> bool:
    """llama.cpp's converter pairs each scales tensor with the blocks it saw last."""
    before = ["", *names]
    return all(
        before[place] == name.removesuffix(_SCALES) + _BLOCKS
        for place, name in enumerate(names)
        if name.endswith(_SCALES)
    )


def _dense_shards(checkpoint: Checkpoint, adapter: AdapterFile) -> tuple[Shard, ...]:
    sites = {site.module: site for site in adapter.sites}
    operations = []
    kind: Kind
    for name, (dtype, sizes) in checkpoint.arch.expected_tensors().items():
        if name.endswith(_SCALES):
            continue
        if name.endswith(_BLOCKS):
            dense = name.removesuffix(_BLOCKS)
            experts, out, groups, _ = sizes
            kind = "merge experts" if dense in sites else "dequantise"
            operations.append(Operation(kind, dense, name, sites.get(dense), "BF16", (experts, groups * BLOCK, out)))
            continue
        site = sites.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        kind = "merge" if site else "bias" if name in adapter.router_bias else "copy"
        operations.append(Operation(kind, name, name, site, dtype, sizes))
    return _cut(operations)


def _cut(operations: Sequence[Operation]) -> tuple[Shard, ...]:
    """Files of at most SHARD_BYTES, more only where one tensor alone is larger."""
    groups: list[list[Operation]] = [[]]
    for operation in operations:
        here = sum(other.num_bytes for other in groups[-1])
        if groups[-1] and here + operation.num_bytes > SHARD_BYTES and not operation.name.endswith(_SCALES):
            groups.append([])
        groups[-1].append(operation)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group), None)
        for number, group in enumerate(groups, start=1)
    )
