"""What a merge will do, tensor by tensor, worked out from headers alone: nothing is read and nothing is written.

A native checkpoint is planned in the base's own files, order and headers, so that an update of zero gives the same
bytes. A bfloat16 one gets files of its own, cut below 5 GB: that is also how much is done again after an interruption.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.adapters.store import AdapterFile, StoredSite
from finetune.arch import DTYPE_BYTES, Arch
from finetune.errors import InputError
from finetune.export.options import MergedTarget, Rounding
from finetune.model.checkpoint import Checkpoint
from finetune.mxfp4.constants import BLOCK

SHARD_BYTES = 5_000_000_000  # what transformers cut at for years; smaller is only more files
Kind = Literal["copy", "merge", "bias", "dequantise", "merge experts", "round experts", "scales", "expert bias"]
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"
_KINDS: dict[str, Kind] = {_BLOCKS: "round experts", _SCALES: "scales", _BIAS: "expert bias", ".weight": "merge"}


@dataclass(frozen=True)
class Operation:
    """How one tensor of the result is made.

    Attributes:
        kind: `copy` the base's bytes; `merge` a bfloat16 weight with its update; `bias` a router's with its
            change; `dequantise` experts as they are or
            `merge experts` with their update, into bfloat16 [E, in, out]; `round experts` with their update to MXFP4
            blocks, and write the `scales` found there and the `expert bias` that takes up their mean error.
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
    source: AdapterFile
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
    checkpoint: Checkpoint, source: AdapterFile, target: MergedTarget, rounding: Rounding = "nearest"
) -> MergePlan:
    """Plan a merged checkpoint.

    Args:
        checkpoint: the base.
        source: the adapter.
        target: `bf16` or `mxfp4`; `gguf` is planned as one of them and written by `finetune.export.gguf_file`.
        rounding: of `mxfp4`; compensated rounding changes the experts' biases as well.

    Raises:
        InputError: the adapter does not fit the base's shapes.
    """
    check_fits(checkpoint.arch, source)
    if target == "mxfp4":
        shards = _native_shards(checkpoint, source, biases=rounding == "compensated")
    else:
        shards = _dense_shards(checkpoint, source)
    return MergePlan(target, checkpoint, source, shards, rounding)


def check_fits(shape: Arch, source: AdapterFile) -> None:
    """Compare every site's shapes with the base's weights.

    Raises:
        InputError: names the first site that does not fit.
    """
    tensors = shape.expected_tensors()
    for name, change in source.router_bias.items():
        if name not in tensors or tensors[name][1] != tuple(change.shape):
            raise InputError(f"{source.directory} changes {name} {list(change.shape)}, which the base has not")
    for site in source.sites:
        name = site.module + (_BLOCKS if site.num_experts else ".weight")
        if name not in tensors:
            raise InputError(
                f"{source.directory} adapts {site.module}, which the base has not ({shape.num_layers} layers)",
                fix="give the base the adapter was trained on with --base",
            )
        sizes = tensors[name][1]
        experts, out, inputs = (*sizes[:2], sizes[2] * BLOCK) if site.num_experts else (0, *sizes)
        if (site.num_experts, site.out, site.inputs) != (experts, out, inputs):
            of = f"{experts} experts of " if experts else ""
            has = f"{site.num_experts} experts of " if site.num_experts else ""
            raise InputError(
                f"{source.directory}: {site.module} updates {has}{site.out} x {site.inputs}, the base has "
                f"{of}{out} x {inputs}",
                fix="give the base the adapter was trained on with --base",
            )


def describe_plan(plan: MergePlan) -> list[str]:
    """One line a tensor with its bytes, file by file, and the totals."""
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


def _native_shards(checkpoint: Checkpoint, source: AdapterFile, *, biases: bool) -> tuple[Shard, ...]:
    sites = {site.module: site for site in source.sites}
    ends = (_BLOCKS, _SCALES, _BIAS, ".weight") if biases else (_BLOCKS, _SCALES, ".weight")
    by_file: dict[str, list[Operation]] = {}
    for name, entry in checkpoint.entries.items():
        end = next((end for end in ends if name.endswith(end)), "")
        site = sites.get(name.removesuffix(end)) if end else None
        kind: Kind = "copy"
        if site is not None:
            kind = _KINDS[end]
        elif name in source.router_bias:
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


def _dense_shards(checkpoint: Checkpoint, source: AdapterFile) -> tuple[Shard, ...]:
    sites = {site.module: site for site in source.sites}
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
        kind = "merge" if site else "bias" if name in source.router_bias else "copy"
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
