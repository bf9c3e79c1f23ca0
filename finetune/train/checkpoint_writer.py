"""Writes checkpoints beside the training: the loop copies what is to be saved and goes on, a thread does the rest."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from finetune import log
from finetune.train.checkpoint_files import prune_checkpoints
from finetune.train.checkpoints import Checkpoint, save_checkpoint


class CheckpointWriter:
    """One write at a time, in the order asked for, into one directory.

    Hashing, flushing to disk and pruning happen in a thread, so that a step waits for a copy in host memory only; a
    save that comes while the one before is still being written waits for it. What goes wrong in the thread is raised
    by the next call of any method, and at the latest at the end of the `with` block. Leaving the block always waits: a
    run that says "everything is saved" has it on disk.

    Args:
        directory: of the run's checkpoints.
        keep: newest ones that stay (`save.keep`).
        background: False: `save` returns when the checkpoint is on disk.
    """

    def __init__(self, directory: Path, keep: int, *, background: bool) -> None:
        self.directory, self.keep, self.background = directory, keep, background
        self._thread: threading.Thread | None = None
        self._step = 0
        self._failure: BaseException | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None and self._thread.is_alive() and error is not None:
            log.info(f"waiting for the checkpoint of step {self._step}")
        if error is None:
            self.wait()
            return
        try:
            self.wait()
        except Exception as failure:  # what ended the run matters more
            log.warning(f"the checkpoint of step {self._step} was not saved: {failure}")

    def save(self, step: int, checkpoint: Checkpoint, best_step: int | None) -> None:
        """Save a moment and remove the checkpoints no longer kept.

        Args:
            step: of the checkpoint.
            checkpoint: on the CPU; it may share memory with what is being trained.
            best_step: stays beside the newest; None: nothing does.

        Raises:
            MachineError: this write (without `background`), or the one before, failed.
        """
        self.wait()
        if not self.background:
            self._write(step, checkpoint, best_step)
            return
        self._step = step
        # Not a daemon would make a third Ctrl-C wait as well; killing the thread is as harmless as killing the process.
        self._thread = threading.Thread(
            target=self._write_and_keep_failure, args=(step, checkpoint.copy(), best_step), daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what a finished write met, without waiting for one that is under way.

        Raises:
            MachineError: the write failed.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until everything asked for is on disk.

        Raises:
            MachineError: the write failed.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write_and_keep_failure(self, step: int, checkpoint: Checkpoint, best_step: int | None) -> None:
        try:
            self._write(step, checkpoint, best_step)
        except BaseException as failure:  # raised again where someone is listening
            self._failure = failure

    def _write(self, step: int, checkpoint: Checkpoint, best_step: int | None) -> None:
        save_checkpoint(self.directory, step, checkpoint)
        prune_checkpoints(self.directory, self.keep, best_step)
