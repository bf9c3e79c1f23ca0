"""bitsandbytes, which most runs do not need: imported when an option asks for it."""

from __future__ import annotations

import logging
from types import ModuleType

from finetune.errors import MachineError


def import_bitsandbytes(wanted_by: str, instead: str) -> ModuleType:
    """Import it, or say what wants it.

    Args:
        wanted_by: the recipe's key and value, for the message.
        instead: what to set to do without.

    Raises:
        MachineError: it is not installed.
    """
    without_kernel_advice()
    try:
        import bitsandbytes
    except ImportError as error:
        raise MachineError(
            f"{wanted_by} needs bitsandbytes, which cannot be imported",
            why=str(error),
            fix=f"pip install bitsandbytes, or set {instead}",
        ) from error
    return bitsandbytes


def without_kernel_advice() -> None:
    """Drop one line that bitsandbytes logs when it is imported on a CPU with AVX512-BF16; call before importing it.

    It advises to install a package that downloads a matrix product from the hub; nothing here calls that product, and
    on the way to a result the line reads like a failure. Every other line of bitsandbytes' stays.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_kernel_advice)


def _is_no_kernel_advice(record: logging.LogRecord) -> bool:
    return "from kernels-community" not in str(record.msg)
