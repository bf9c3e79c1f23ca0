"""The processes of a run: opened, checked against the recipe, and what they tell each other.

Small messages (shall we stop? did anyone run out of memory?) go through gloo on the CPU whatever the device: they wait
for no GPU, and one that is hung there does not take the answer with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune import log
from finetune.config.schema import ModelConfig, RunConfig
from finetune.errors import CheckError, MachineError
from finetune.model.open import choose_device

GRACE = 1.5  # torch's own time-out comes after ours, which knows more (train/watchdog.py)


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this one's number, from 0. Process 0 alone writes and prints.
        count: how many there are.
        backend: what carries tensors between them, such as `gloo` or `cpu:gloo,cuda:nccl`; None for one process.
        store: where each process leaves word of what it is doing; None for one process.
    """

    rank: int = 0
    count: int = 1
    backend: str | None = None
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.count == 1:
            return value
        message = torch.tensor(value)
        dist.all_reduce(message, dist.ReduceOp.MAX)
        return int(message)

    def sums(self, *values: float) -> list[float]:
        """The sum over processes of each value, in float64."""
        message = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(message)
        return [float(value) for value in message]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank. The values travel between our own processes only."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Process 0's value."""
        if self.count == 1:
            return value
        message = [value]
        dist.broadcast_object_list(message, src=0)
        return message[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self.largest(0)

    def leave(self) -> None:
        """Take leave of the others: from here on each is alone."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def assert_same(self, what: str, value: str) -> None:
        """Refuse to go on when a value is not the same everywhere.

        Raises:
            CheckError: names the processes that differ from the first.
        """
        values = self.gather(value)
        others = [rank for rank, theirs in enumerate(values) if theirs != values[0]]
        if others:
            raise CheckError(
                f"{what} of process {', '.join(map(str, others))} is not that of process 0",
                why=f"{values[others[0]][:60]} there, {values[0][:60]} here: they would train different things",
                fix="give every process the same files, recipe and version of this tool",
            )


ALONE = World()


def launched_processes() -> int | None:
    """How many processes a launcher says there are (torchrun's variables), or None when this one was started alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["WORLD_SIZE"])


def open_world(config: RunConfig) -> World:
    """Meet the other processes that the launcher has started.

    Raises:
        MachineError: another number of processes than the recipe's, fewer GPUs than processes, or they do not meet.
    """
    wanted, running = config.distributed, launched_processes() or 1
    if running != wanted.num_processes:
        raise MachineError(
            f"{running} processes run, the recipe says {wanted.num_processes} (distributed.kind={wanted.kind})",
            why="processes that do not know of each other train separate adapters and overwrite one another",
            fix="start it with `finetune train` and no launcher, or make distributed.num_processes what the launcher "
            "starts",
        )
    if wanted.kind == "single":
        return World()
    on_gpu = config.model.device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if on_gpu:
        _take_gpu()
    processes = _meet(backend, wanted.timeout_s)
    log.set_rank(processes.rank)
    if processes.count != wanted.num_processes:
        raise MachineError(f"{processes.count} processes met, the recipe says {wanted.num_processes}")
    return processes


def _take_gpu() -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise MachineError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}",
            why="two processes on one GPU would take each other's memory",
            fix="lower distributed.num_processes, or set model.device=cpu",
        )
    torch.cuda.set_device(local)


def _meet(backend: str, timeout_s: float) -> World:
    if os.environ.get("MASTER_PORT") == "0":  # torch would wait for the time-out without a word
        raise MachineError(
            "the launcher set MASTER_PORT=0, where nobody can meet",
            fix="torchrun --standalone chooses a free port; or give --master-port a number",
        )
    timeout = timedelta(seconds=timeout_s * GRACE)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            backend, store=dist.PrefixStore("torch", store), rank=rank, world_size=count, timeout=timeout
        )
        processes = World(rank, count, backend, dist.PrefixStore("finetune", store))
        processes.wait()
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"the processes did not meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            why=str(error).splitlines()[0],
            fix="look at the other processes' output: one of them may have stopped first",
        ) from error
    return processes


_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "NCCL")


@contextmanager
def explain_lost_ranks(processes: World) -> Iterator[None]:
    """Turn torch's words for "nobody answers" into a message.

    Raises:
        MachineError: another process has gone while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        if processes.count == 1 or not (isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)):
            raise
        raise MachineError(
            f"another process of the run has gone, and process {processes.rank} cannot go on without it",
            why=str(error).splitlines()[0][:200],
            fix="look at what the others wrote: logs/process-N.txt in the run directory, or the launcher's output",
        ) from error


@contextmanager
def closing(processes: World) -> Iterator[None]:
    """Take leave of the other processes at the end of the block, however it ends."""
    try:
        with explain_lost_ranks(processes):
            yield
    finally:
        processes.leave()


# What the device of a run is and how much of its memory is free, before anything is loaded.


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory: all of it, and what is free or held by this process's allocator."""

    name: str
    total_bytes: int
    free_bytes: int


def gpu_memory(config: ModelConfig) -> GpuMemory | None:
    """Memory of the GPU that a recipe would use; None if it runs on the CPU.

    Raises:
        MachineError: the recipe demands a GPU and there is none.
    """
    device = choose_device(config)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(torch.cuda.get_device_name(device), total, free + torch.cuda.memory_reserved(device))
