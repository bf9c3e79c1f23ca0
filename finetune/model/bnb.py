"""bitsandbytes, imported when first needed: importing it takes seconds, and most runs do not use it."""

from __future__ import annotations

import logging
from types import ModuleType

from finetune.errors import MachineError


def import_bitsandbytes(wanted_by: str, instead: str) -> ModuleType:
    """Import it without its warning about a hub package that it could have used on CPUs with AVX-512.

    Args:
        wanted_by: the recipe's key and value, for the message.
        instead: what to set to do without.

    Raises:
        MachineError: it is not installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise MachineError(
            f"{wanted_by} needs bitsandbytes, which cannot be imported",
            why=str(error),
            fix=f"pip install bitsandbytes, or set {instead}",
        ) from error
    return bitsandbytes
