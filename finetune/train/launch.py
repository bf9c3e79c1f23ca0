"""Start the ranks of a run on this machine, forward signals to them, and report which of them failed first.

Each rank is the `finetune` command again, with torchrun's environment variables; so torchrun, `accelerate launch`,
`deepspeed` and Slurm can be used instead of this module. It imports no torch: the parent process stays small, and
starts the ranks at once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from finetune import log
from finetune.errors import MachineError
from finetune.machine import num_cores
from finetune.train.run_directory import Run

POLL_SECONDS = 0.05
GRACE_SECONDS = 15.0  # for the other ranks to notice that one failed, and to report it
SECOND_CTRL_C_SECONDS = 2.0
LAST_LINES = 15
WATCHED = "FINETUNE_WATCH_PARENT"
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Workers:
    """The started ranks; rank 0 prints to the terminal, the output of the others goes to files."""

    def __init__(self, arguments: Sequence[str], count: int, logs: Path) -> None:
        self.logs = logs
        self.interrupts = 0
        self.deadline: float | None = None
        self.first_failure: tuple[int, int] | None = None
        self.codes: dict[int, int] = {}
        logs.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(count):
            self.running[rank] = _start(arguments, rank, count, port, self.log(rank))

    def log(self, rank: int) -> Path:
        return self.logs / f"process-{rank}.txt"

    def forward(self, number: int, _frame: FrameType | None = None) -> None:
        """Forward a signal; after a second Ctrl-C the ranks are given little time to end."""
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            self.deadline = time.monotonic() + SECOND_CTRL_C_SECONDS
        for process in self.running.values():
            process.send_signal(number)

    def wait(self) -> None:
        """Wait for all ranks to end. Once one has failed, the others get a grace period and are then killed."""
        while self.running:
            for rank, process in list(self.running.items()):
                if (code := process.poll()) is None:
                    continue
                del self.running[rank]
                self.codes[rank] = code
                if code != 0 and self.first_failure is None:
                    self.first_failure = (rank, code)
                    self.deadline = self.deadline or time.monotonic() + GRACE_SECONDS
            if self.deadline is not None and time.monotonic() > self.deadline:
                self.kill()
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        for process in self.running.values():
            process.kill()


def launch(arguments: Sequence[str], count: int, run: Run) -> None:
    """Run `finetune ARGUMENTS` on `count` ranks and wait for them.

    Args:
        arguments: the command line of each rank.
        count: how many ranks, all on this machine.
        run: output of all ranks but rank 0 goes to `logs/` in its directory.

    Raises:
        MachineError: a rank was killed.
        SystemExit: a rank failed; it has reported why, and its exit code is passed on.
    """
    logs = run.path / "logs"
    log.info(f"starting {count} ranks; only rank 0 prints, the others write to {logs}")
    workers = _Workers(arguments, count, logs)
    before = {number: signal.signal(number, workers.forward) for number in _FORWARDED}
    try:
        workers.wait()
    finally:
        workers.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
        _remove_empty(workers.logs)
    if workers.first_failure is not None:
        _record_end(run, *workers.first_failure)
        _report(workers, *workers.first_failure)


def watch_parent() -> None:
    """In a started rank: stop as SIGTERM does when the parent process is gone, however it ended."""
    if os.environ.pop(WATCHED, None) is None:
        return

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="watch-parent", daemon=True).start()


def _start(arguments: Sequence[str], rank: int, count: int, port: int, log_file: Path) -> subprocess.Popen[bytes]:
    threads = max(1, num_cores() // count)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        WATCHED: "1",
    }  # fmt: skip
    # -P: a folder named `finetune` where the command is run must not be taken for this package.
    command = [sys.executable, "-P", "-m", "finetune", *arguments]
    # A session of its own: Ctrl-C reaches the parent alone, which forwards it once to each rank.
    with log_file.open("ab") as file:
        output = None if rank == 0 else file
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _remove_empty(logs: Path) -> None:
    for log_file in logs.glob("process-*.txt"):
        if log_file.stat().st_size == 0:
            log_file.unlink()
    if logs.is_dir() and not any(logs.iterdir()):
        logs.rmdir()


def _record_end(run: Run, rank: int, code: int) -> None:
    """Record in manifest.json how a run ended, where rank 0 had no time to."""
    if run.status == "running":
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        run.update_manifest(status="stopped", stopped_by=f"rank {rank} {how}")


def _report(workers: _Workers, rank: int, code: int) -> NoReturn:
    if workers.interrupts > 1:
        raise SystemExit(128 + signal.SIGINT)
    log_file = workers.log(rank)
    stopped = code in (130, 143)  # by a signal, which all ranks have agreed on
    if rank != 0 and log_file.exists() and not stopped and code > 0 and workers.codes.get(0) == code:
        log.info(f"rank {rank} stopped first, with the same exit code; its output is in {log_file}")
    elif rank != 0 and log_file.exists() and not stopped:
        lines = log_file.read_text(errors="replace").splitlines()[-LAST_LINES:]
        log.error(f"rank {rank} stopped first; the end of {log_file}:\n" + "\n".join(f"  | {line}" for line in lines))
    if code < 0:
        name = signal.Signals(-code).name
        raise MachineError(
            f"rank {rank} was killed by {name}",
            why="most likely the kernel sent SIGKILL because memory ran out" if name == "SIGKILL" else None,
            fix="`finetune train --resume` continues from the last checkpoint, if there is one",
        )
    raise SystemExit(code)
