"""Watchdog for runs of several ranks that hang, and requests to stop by signal.

A collective operation that waits for a rank that never comes cannot be interrupted from inside. A thread on every rank
measures the time since that rank's last heartbeat; past the time-out it prints the stack of every thread, compares the
last heartbeats of all ranks, and ends the process. This covers hangs anywhere (a lock, a file system, a GPU), and comes
before torch's own time-out, which only knows that a rank is missing.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from finetune import log
from finetune.errors import MachineError
from finetune.train.world import World

CHECKS = 20  # per time-out, at least
TICK_SECONDS = 2.0  # between two ticks of a process that still runs, whatever its main thread waits for
SETTLE_SECONDS = 1.0  # for the watchdogs of other ranks to reach the same conclusion
STANDARD_ERROR = 2


class Watchdog:
    """Context manager that ends the process when its heartbeats stop for too long. Does nothing for one process.

    Args:
        world: the ranks of the run.
        timeout_s: longest time between two heartbeats.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        self.world, self.timeout_s = world, timeout_s
        self._beats, self._last, self._doing = 0, time.monotonic(), "starting"
        self._over = threading.Event()
        self._interval, self._ticks = min(TICK_SECONDS, timeout_s / CHECKS), 0

    def __enter__(self) -> Watchdog:
        if self.world.world_size > 1:
            self.heartbeat("starting")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def heartbeat(self, doing: str) -> None:
        """Record progress, and what begins now."""
        self._beats, self._last, self._doing = self._beats + 1, time.monotonic(), doing
        if self.world.store is not None:
            self.world.store.set(_key(self.world.rank), f"{self._beats} {doing}")

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self.tick()
            if time.monotonic() - self._last > self.timeout_s:
                self._end()

    def _end(self) -> None:
        log.error(f"no progress for {self.timeout_s:g} s in: {self._doing}; the stack of every thread:")
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        try:
            log.error(f"error: {self.explain(self._frozen())}")
            time.sleep(SETTLE_SECONDS)
        except RuntimeError as error:  # rank 0 serves the store
            log.error(f"error: the run hangs, and rank 0, which stores all heartbeats, does not answer: {error}")
        finally:
            os._exit(MachineError.exit_code)

    def _frozen(self) -> list[int]:
        before = self.ticks()
        for _ in range(3):  # other ranks may be doing the same and must see that this one runs
            time.sleep(self._interval)
            self.tick()
        return [rank for rank, ticks in enumerate(self.ticks()) if ticks == before[rank]]

    def tick(self) -> None:
        """Record that this process runs, even if it makes no progress."""
        self._ticks += 1
        if self.world.store is not None:
            with suppress(RuntimeError):  # rank 0 is gone, and the store with it: this watchdog is needed all the more
                self.world.store.set(f"tick/{self.world.rank}", str(self._ticks))

    def ticks(self) -> list[int]:
        """Number of ticks of each rank."""
        store = self.world.store
        keys = [f"tick/{rank}" for rank in range(self.world.world_size)]
        return [int(store.get(key)) if store is not None and store.check([key]) else 0 for key in keys]

    def explain(self, frozen: Sequence[int] = ()) -> MachineError:
        """Name the rank that is behind, by the last heartbeat of each.

        Args:
            frozen: ranks that do not even tick any more: stopped, or their machine is gone.
        """
        heartbeats = [_last_heartbeat(self.world.store, rank) for rank in range(self.world.world_size)]
        fewest = min(beats for beats, _ in heartbeats)
        behind = [str(rank) for rank, (beats, _) in enumerate(heartbeats) if beats == fewest]
        if frozen:
            which = f"rank {', '.join(map(str, frozen))} is missing: stopped, or its machine is gone"
        elif len(behind) == len(heartbeats):
            which = "all ranks wait at the same place"
        else:
            which = f"rank {', '.join(behind)} is missing: the others have gone further"
        return MachineError(
            f"the run hangs: {which}",
            why="; ".join(f"rank {rank}: {doing}" for rank, (_, doing) in enumerate(heartbeats)),
            fix="look at that rank's stack and machine, then `finetune train --resume`; raise distributed.timeout_s "
            "if a step may take so long",
        )


def _last_heartbeat(store: dist.Store | None, rank: int) -> tuple[int, str]:
    if store is None or not store.check([_key(rank)]):
        return 0, "has not begun"
    beats, _, doing = store.get(_key(rank)).decode().partition(" ")
    return int(beats), doing


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


class StopRequest:
    """Context manager that turns the first SIGINT, SIGTERM or SIGUSR1 into a flag; a second Ctrl-C stops at once.

    SIGUSR1, which schedulers send before the time is up, counts as SIGTERM.

    Attributes:
        signal_number: SIGINT or SIGTERM; None as long as no signal came.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = signal.SIGTERM if number == signal.SIGUSR1 else number
        name = signal.Signals(number).name
        text = f"\n{name}: saving at the next safe place (Ctrl-C again stops at once, keeping older checkpoints)\n"
        # Not `print`: the signal may have come in the middle of one, and buffered output refuses to be re-entered.
        os.write(STANDARD_ERROR, text.encode())
