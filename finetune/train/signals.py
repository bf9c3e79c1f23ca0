"""Ctrl-C, SIGTERM and SIGUSR1 ask the loop to stop at the next safe place; a second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

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
