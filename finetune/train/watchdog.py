"""When nothing happens any more: say which process is behind and what each was doing, and end.

A collective operation that waits for a process that does not come cannot be left from inside. A thread in every process
watches the time since its own last sign of life; when that gets too long it prints the stack of every thread, compares
what all processes last said, and ends the process. It works for hangs anywhere (a lock, a file system, a GPU), and
before torch's own time-out, which only knows that somebody is missing.
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

CHECKS = 20  # in one time-out, at least
TICK_SECONDS = 2.0  # between two signs of a process that still runs, whatever its main thread waits for
SETTLE_SECONDS = 1.0  # for the others' watches to come to the same conclusion


class Watchdog:
    """Context manager that ends the process when it gives no sign of life for too long. Nothing for one process.

    Args:
        processes: who takes part.
        timeout_s: how long is too long.
    """

    def __init__(self, processes: World, timeout_s: float) -> None:
        self.processes, self.timeout_s = processes, timeout_s
        self._beats, self._last, self._doing = 0, time.monotonic(), "starting"
        self._over = threading.Event()
        self._interval, self._ticks = min(TICK_SECONDS, timeout_s / CHECKS), 0

    def __enter__(self) -> Watchdog:
        if self.processes.count > 1:
            self.beat("starting")
            threading.Thread(target=self._watch, name="hang-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def beat(self, doing: str) -> None:
        """Give a sign of life: what begins now."""
        self._beats, self._last, self._doing = self._beats + 1, time.monotonic(), doing
        if self.processes.store is not None:
            self.processes.store.set(_key(self.processes.rank), f"{self._beats} {doing}")

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self.tick()
            if time.monotonic() - self._last > self.timeout_s:
                self._end()

    def _end(self) -> None:
        log.error(f"no sign of life for {self.timeout_s:g} s, in: {self._doing}; every thread's stack:")
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        try:
            log.error(f"error: {self.explain(self._frozen())}")
            time.sleep(SETTLE_SECONDS)
        except RuntimeError as error:  # the store lives in process 0
            log.error(f"error: the run hangs, and process 0, which knows what each said last, does not answer: {error}")
        finally:
            os._exit(MachineError.exit_code)

    def _frozen(self) -> list[int]:
        before = self.ticks()
        for _ in range(3):  # the others may be doing the same and must see that this one runs
            time.sleep(self._interval)
            self.tick()
        return [rank for rank, ticks in enumerate(self.ticks()) if ticks == before[rank]]

    def tick(self) -> None:
        """Say that this process runs, even if nothing happens in it."""
        self._ticks += 1
        if self.processes.store is not None:
            with suppress(RuntimeError):  # process 0 has gone, and the store with it: this watch is needed all the more
                self.processes.store.set(f"tick/{self.processes.rank}", str(self._ticks))

    def ticks(self) -> list[int]:
        """How often each process has ticked."""
        store, count = self.processes.store, self.processes.count
        keys = [f"tick/{rank}" for rank in range(count)]
        return [int(store.get(key)) if store is not None and store.check([key]) else 0 for key in keys]

    def explain(self, frozen: Sequence[int] = ()) -> MachineError:
        """Which process is behind, from what each said last.

        Args:
            frozen: processes that do not even tick any more: stopped, or their machine is gone.
        """
        words = [_last_word(self.processes.store, rank) for rank in range(self.processes.count)]
        fewest = min(count for count, _ in words)
        behind = [str(rank) for rank, (count, _) in enumerate(words) if count == fewest]
        if frozen:
            who = f"process {', '.join(map(str, frozen))} is missing: stopped, or its machine is gone"
        elif len(behind) == len(words):
            who = "all processes wait at the same place"
        else:
            who = f"process {', '.join(behind)} is missing: the others have gone further"
        return MachineError(
            f"the run hangs: {who}",
            why="; ".join(f"process {rank}: {doing}" for rank, (_, doing) in enumerate(words)),
            fix="look at that process's stack and machine, then `finetune train --resume`; raise distributed.timeout_s "
            "if a step may take so long",
        )


def _last_word(store: dist.Store | None, rank: int) -> tuple[int, str]:
    if store is None or not store.check([_key(rank)]):
        return 0, "has not begun"
    count, _, doing = store.get(_key(rank)).decode().partition(" ")
    return int(count), doing


def _key(rank: int) -> str:
    return f"beat/{rank}"


# Ctrl-C, SIGTERM and SIGUSR1 ask the loop to stop at the next safe place; a second Ctrl-C leaves at once.

STANDARD_ERROR = 2


class StopRequest:
    """Context manager that turns the first SIGINT, SIGTERM or SIGUSR1 into a flag.

    SIGUSR1, which schedulers send before the time is up, is taken as SIGTERM.

    Attributes:
        signal_number: SIGINT or SIGTERM, or None as long as none came.
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
        text = f"\n{name}: saving at the next safe place (Ctrl-C again leaves at once, keeping older checkpoints)\n"
        # Not `print`: the signal may have come in the middle of one, and buffered output refuses to be re-entered.
        os.write(STANDARD_ERROR, text.encode())
