"""Errors that end a command: each says what happened, why and what to do, and has an exit code.

An exception that is not a `FinetuneError` is a bug in this tool and exits with 1.
"""

from __future__ import annotations

import re


class FinetuneError(Exception):
    """Base of all errors that are reported to the user without a traceback.

    Args:
        what: one sentence that names the file, key or tensor at fault and what is wrong with it.
        why: the reason or the consequence, if it does not follow from `what`.
        fix: what to type or change.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class ConfigError(FinetuneError):
    """A recipe, an override or a command line that cannot be run as written."""

    exit_code = 2


class InputError(FinetuneError):
    """Data, a checkpoint or an adapter that is missing, broken or of the wrong kind."""

    exit_code = 3


class CapacityError(FinetuneError):
    """Work that does not fit into memory."""

    exit_code = 4


class MachineError(FinetuneError):
    """A fault of this machine: a missing package, no network, a full disk, another topology."""

    exit_code = 5


class CheckError(FinetuneError):
    """A failed check: non-finite numbers, the audit, a read-back, the frozen base."""

    exit_code = 6


class Interrupted(FinetuneError):
    """A stop by a signal, after saving the work so far.

    Args:
        signal_number: 2 (SIGINT) or 15 (SIGTERM); the exit code is 128 plus it.
    """

    def __init__(self, what: str, *, signal_number: int, fix: str | None = None) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = 128 + signal_number


_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory"  # torch on the host
    r"|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_HOST_ALLOCATION_FAILED)"
    r"|(CUDA|Cuda|NCCL)[^\n]*out of memory",  # "CUDA error: out of memory"; NCCL: "Cuda failure 2 'out of memory'"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or the host; torch's errors are recognised by name, without importing torch.

    torch's host allocator, cuBLAS, cuDNN, NCCL and the CUDA runtime report it in the text of a plain RuntimeError.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    by_text = isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names or by_text
