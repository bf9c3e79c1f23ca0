"""Writes the shards of a plan one after the other, each tensor in pieces: memory does not grow with the model.

Experts are computed a few at a time by worker threads (torch releases the interpreter lock) while this thread hashes
and writes what is ready, in order.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from finetune import log
from finetune.export.factors import part_of
from finetune.export.plan import MergePlan, Operation, Shard
from finetune.kernels.experts import LoraFactors
from finetune.machine import num_cores
from finetune.model.checkpoint import Checkpoint
from finetune.resumable import ResumableDirectory
from finetune.rounding.merge import Tally, add_to_experts, merge_weight
from finetune.rounding.nearest import round_experts, seeded_noise
from finetune.rounding.results import RoundedExperts

PIECE_BYTES = 48 << 20  # of the result; every worker has one in memory, and one waits
_MAX_WORKERS = 8
Item = TypeVar("Item")
Made = TypeVar("Made")


def write_shards(
    plan: MergePlan, staging: ResumableDirectory, rounded: RoundedExperts | None = None
) -> dict[str, Tally]:
    """Write every shard that is not there yet.

    Args:
        plan: what to write.
        staging: where; finished shards stay if anything interrupts.
        rounded: experts that were rounded before. None: they are rounded here.

    Returns:
        Sums of each update, by the name of the tensor written (blocks, for rounded experts).
    """
    done = sum(shard.num_bytes for shard in plan.shards if shard.file in staging.files)
    with log.Progress("merging", plan.num_bytes >> 20, "MiB") as progress, worker_pool() as pool:
        progress.start_at(done >> 20)
        for shard in plan.shards:
            if shard.file in staging.files:
                continue
            try:
                digest, tallies = _write_shard(
                    plan, shard, staging.unfinished(shard.file), pool, progress, done, rounded
                )
            except BaseException:
                staging.remove_unfinished()
                raise
            staging.finish(shard.file, {"sha256": digest, "tallies": _plain(tallies)})
            done += shard.num_bytes
    stored = [staging.files[shard.file]["tallies"] for shard in plan.shards]
    return {name: Tally(**values) for tallies in stored for name, values in tallies.items()}


def worker_pool() -> ThreadPoolExecutor:
    """Threads that compute pieces; one torch thread in each, since pieces are small and there are several."""
    workers = min(_MAX_WORKERS, num_cores())
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def in_order(pool: ThreadPoolExecutor, make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Results of `make` in the order of `items`, with no more than one waiting beyond the workers."""
    waiting: deque[Future[Made]] = deque()
    for item in items:
        waiting.append(pool.submit(make, item))
        if len(waiting) > pool._max_workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def expert_ranges(operation: Operation) -> list[tuple[int, int]]:
    """Cut the experts of a tensor into ranges whose result is about PIECE_BYTES."""
    num_experts = operation.shape[0]
    step = max(1, PIECE_BYTES * num_experts // max(1, operation.num_bytes))
    return [(first, min(num_experts, first + step)) for first in range(0, num_experts, step)]


def read_experts(
    checkpoint: Checkpoint, operation: Operation, factors: LoraFactors | None, first: int, last: int
) -> tuple[Tensor, Tensor, LoraFactors | None]:
    """Blocks, scales and factors of a range of experts."""
    blocks = checkpoint.read_rows(operation.base, first, last)
    scales = checkpoint.read_rows(operation.base.removesuffix("_blocks") + "_scales", first, last)
    return blocks, scales, None if factors is None else part_of(factors, slice(first, last))


def _write_shard(
    plan: MergePlan,
    shard: Shard,
    path: Path,
    pool: ThreadPoolExecutor,
    progress: log.Progress,
    done: int,
    rounded: RoundedExperts | None,
) -> tuple[str, dict[str, Tally]]:
    """Write one file; its SHA-256, and the sums of the updates in it."""
    digest = hashlib.sha256()
    tallies: dict[str, Tally] = {}
    scales: dict[str, Tensor] = {}  # of rounded experts, until their turn comes
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:

        def write(data: memoryview | bytes) -> None:
            hashed = hasher.submit(digest.update, data)  # beside the writing, which waits for the disk
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            hashed.result()

        write(_header(plan.checkpoint, shard))
        for operation in shard.operations:
            tally = Tally()
            for piece in _pieces(plan, operation, pool, tally, scales, rounded):
                write(as_bytes(piece))
                done += piece.nbytes
                progress.show(done >> 20, shard.file)
            if operation.site and operation.kind != "scales":
                tallies[operation.name] = tally
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
    return digest.hexdigest(), tallies


def _pieces(
    plan: MergePlan,
    operation: Operation,
    pool: ThreadPoolExecutor,
    tally: Tally,
    scales: dict[str, Tensor],
    rounded: RoundedExperts | None,
) -> Iterator[Tensor]:
    """The tensor of one operation, in consecutive parts."""
    checkpoint = plan.checkpoint
    if rounded is not None and operation.kind in ("round experts", "scales", "expert bias"):
        if operation.name in rounded.tallies:
            tally.add(rounded.tallies[operation.name])
        yield from (rounded.read_experts(operation.name, *span) for span in expert_ranges(operation))
        return
    factors = plan.adapter.read(operation.site) if operation.site and operation.kind != "scales" else None
    match operation.kind:
        case "copy":
            yield from _copied(checkpoint, operation)
        case "merge":
            assert factors is not None
            merged, made = merge_weight(checkpoint.read_rows(operation.base, 0, operation.shape[0]), factors)
            tally.add(made)
            yield merged
        case "bias":
            yield merge_bias(plan, operation)
        case "scales":
            yield scales.pop(operation.base)
        case "dequantise" | "merge experts":

            def dense(span: tuple[int, int]) -> tuple[Tensor, Tally]:
                return add_to_experts(*read_experts(checkpoint, operation, factors, *span), transposed=True)

            for piece, made in in_order(pool, dense, expert_ranges(operation)):
                tally.add(made)
                yield piece
        case "round experts":
            yield from _rounded(plan, operation, factors, pool, tally, scales)


def merge_bias(plan: MergePlan, operation: Operation) -> Tensor:
    """A router's bias with its change, bfloat16 [E], rounded once."""
    bias = plan.checkpoint.read_rows(operation.base, 0, operation.shape[0])
    return (bias.float() + plan.adapter.router_bias[operation.name]).to(bias.dtype)


def _rounded(
    plan: MergePlan,
    operation: Operation,
    factors: LoraFactors | None,
    pool: ThreadPoolExecutor,
    tally: Tally,
    scales: dict[str, Tensor],
) -> Iterator[Tensor]:
    """Blocks of rounded experts; their scales are kept for the tensor that follows."""
    assert factors is not None
    checkpoint = plan.checkpoint
    if not factors.b.count_nonzero() or not factors.a.count_nonzero():  # nothing to round: the bytes stay
        yield from _copied(checkpoint, operation)
        name = operation.base.removesuffix("_blocks") + "_scales"
        scales[operation.base] = checkpoint.read_rows(name, 0, operation.shape[0])
        return

    def rounded(span: tuple[int, int]) -> tuple[Tensor, Tensor, Tally]:
        blocks, old, part = read_experts(checkpoint, operation, factors, *span)
        assert part is not None
        noise = seeded_noise(checkpoint, operation.base, span[0]) if plan.rounding == "stochastic" else None
        return round_experts(blocks, old, part, noise, first_expert=span[0])

    found = []
    for blocks, new_scales, made in in_order(pool, rounded, expert_ranges(operation)):
        tally.add(made)
        found.append(new_scales)
        yield blocks
    scales[operation.base] = torch.cat(found)


def _copied(checkpoint: Checkpoint, operation: Operation) -> Iterator[Tensor]:
    rows = operation.shape[0]
    step = max(1, PIECE_BYTES * rows // max(1, operation.num_bytes))
    for first in range(0, rows, step):
        yield checkpoint.read_rows(operation.base, first, min(rows, first + step))


def _header(checkpoint: Checkpoint, shard: Shard) -> bytes:
    """A safetensors header with its length in front: the base's own where the file is laid out like it."""
    if shard.like is not None:
        with (checkpoint.directory / shard.like).open("rb") as file:
            length = file.read(8)
            return length + file.read(struct.unpack("<Q", length)[0])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for operation in shard.operations:
        end = begin + operation.num_bytes
        entries[operation.name] = {
            "dtype": operation.dtype,
            "shape": list(operation.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def as_bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, without a copy."""
    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view


def _plain(tallies: dict[str, Tally]) -> dict[str, dict[str, float]]:
    return {name: asdict(tally) for name, tally in tallies.items()}
