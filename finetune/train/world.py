"""The ranks of a run: joined, checked against the recipe, and their collective operations on small messages.

Small messages (shall we stop? did anyone run out of memory?) go through gloo on the CPU whatever the device: they need
no GPU, and a GPU that hangs does not block them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finetune import log
from finetune.config.schema import RunConfig
from finetune.errors import CheckError, MachineError

Number = TypeVar("Number", int, float)

GRACE = 1.5  # torch's own time-out comes after ours, which knows more (train/watchdog.py)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "NCCL")


@dataclass(frozen=True)
class World:
    """The ranks that train together, as seen from one of them.

    Attributes:
        rank: of this process, from 0. Rank 0 alone writes and prints.
        world_size: how many ranks there are.
        backend: carries tensors between them, such as `gloo` or `cpu:gloo,cuda:nccl`; None for one process.
        store: holds each rank's last heartbeat; None for one process.
    """

    rank: int = 0
    world_size: int = 1
    backend: str | None = None
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def all_reduce_max(self, value: Number) -> Number:
        """The largest of all ranks' values."""
        if self.world_size == 1:
            return value
        message = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        dist.all_reduce(message, dist.ReduceOp.MAX)
        return type(value)(message.item())

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sum over ranks of each value, in float64."""
        message = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(message)
        return [float(value) for value in message]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. The values travel between our own processes only."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.world_size == 1:
            return value
        message = [value]
        dist.broadcast_object_list(message, src=0)
        return message[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            self.all_reduce_max(0)

    def destroy(self) -> None:
        """Leave the process group: from here on this process works alone."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def assert_same(self, what: str, value: str) -> None:
        """Check that a value is the same on every rank.

        Raises:
            CheckError: names the ranks that differ from rank 0.
        """
        values = self.all_gather(value)
        differing = [rank for rank, theirs in enumerate(values) if theirs != values[0]]
        if differing:
            raise CheckError(
                f"{what} of rank {', '.join(map(str, differing))} is not that of rank 0",
                why=f"{values[differing[0]][:60]} there, {values[0][:60]} here: they would train different things",
                fix="give every rank the same files, recipe and version of this tool",
            )


SINGLE_PROCESS = World()


@contextmanager
def open_world(config: RunConfig) -> Iterator[World]:
    """Join the other ranks that the launcher has started; leave them at the end of the block, however it ends.

    Raises:
        MachineError: another number of ranks than the recipe's, fewer GPUs than ranks, the ranks do not meet, or one of
            them is gone while this one waits for it.
    """
    world = join_world(config)
    try:
        with explain_lost_ranks(world):
            yield world
    finally:
        world.destroy()


def join_world(config: RunConfig) -> World:
    """Join the other ranks that the launcher has started.

    Raises:
        MachineError: another number of ranks than the recipe's, fewer GPUs than ranks, or they do not meet.
    """
    wanted, running = config.distributed, _launched_world_size() or 1
    if running != wanted.num_processes:
        raise MachineError(
            f"{running} processes run, the recipe says {wanted.num_processes} (distributed.kind={wanted.kind})",
            why="processes that do not know of each other train separate adapters and overwrite one another",
            fix="start it with `finetune train` and no launcher, or make distributed.num_processes what the launcher "
            "starts",
        )
    if wanted.kind == "single":
        return SINGLE_PROCESS
    on_gpu = config.model.device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if on_gpu:
        _choose_gpu()
    world = _rendezvous(backend, wanted.timeout_s)
    log.set_rank(world.rank)
    if world.world_size != wanted.num_processes:
        raise MachineError(f"{world.world_size} processes met, the recipe says {wanted.num_processes}")
    return world


def _launched_world_size() -> int | None:
    """The number of ranks by the launcher's variables (torchrun's names); None if this process was started alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["WORLD_SIZE"])


def _choose_gpu() -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise MachineError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}",
            why="two ranks on one GPU would compete for its memory",
            fix="lower distributed.num_processes, or set model.device=cpu",
        )
    torch.cuda.set_device(local_rank)


def _rendezvous(backend: str, timeout_s: float) -> World:
    if os.environ.get("MASTER_PORT") == "0":  # torch would wait for the time-out without a message
        raise MachineError(
            "the launcher set MASTER_PORT=0, which is no port to meet at",
            fix="torchrun --standalone chooses a free port; or give --master-port a number",
        )
    timeout = timedelta(seconds=timeout_s * GRACE)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            backend, store=dist.PrefixStore("torch", store), rank=rank, world_size=world_size, timeout=timeout
        )
        world = World(rank, world_size, backend, dist.PrefixStore("finetune", store))
        world.barrier()
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"the ranks did not meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            why=str(error).splitlines()[0],
            fix="see the output of the other ranks: one of them may have stopped first",
        ) from error
    return world


@contextmanager
def explain_lost_ranks(world: World) -> Iterator[None]:
    """Turn torch's errors about a rank that does not answer into a message.

    Raises:
        MachineError: another rank was lost while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)
        if world.world_size == 1 or not is_lost:
            raise
        raise MachineError(
            f"rank {world.rank} lost contact with another rank",
            why=str(error).splitlines()[0][:200],
            fix="see what the other ranks wrote: logs/process-N.txt in the run directory, or the launcher's output",
        ) from error
