"""bitsandbytes, which most runs do not need: imported when an option asks for it."""

from __future__ import annotations

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
    try:
        import bitsandbytes
    except ImportError as error:
        raise MachineError(
            f"{wanted_by} needs bitsandbytes, which cannot be imported",
            why=str(error),
            fix=f"pip install bitsandbytes, or set {instead}",
        ) from error
    return bitsandbytes
