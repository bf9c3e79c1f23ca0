"""The base of a merge as a native checkpoint, whatever it was trained over."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune import log
from finetune.errors import MachineError
from finetune.model.checkpoint import CHECKSUMS_FILE, CONFIG_FILE, INDEX_FILE, Checkpoint, DenseCheckpoint
from finetune.model.write import write_native


@contextmanager
def native_base(checkpoint: Checkpoint, out: Path) -> Iterator[Checkpoint]:
    """A native checkpoint as it is; of a bfloat16 one a rounded copy beside the export, for as long as the block lasts.

    The adapter was trained over the rounded experts, so they are what it is merged into: the original ones plus the
    update would be another model.

    Args:
        checkpoint: the base.
        out: the export's directory; the copy lies beside it.

    Raises:
        MachineError: the disk has no room for the copy.
    """
    if not isinstance(checkpoint, DenseCheckpoint):
        yield checkpoint
        return
    copy = out.with_name(f".{out.name}.base")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    try:
        free = shutil.disk_usage(copy).free
        if free < checkpoint.num_bytes:
            raise MachineError(
                f"a rounded copy of the base needs {checkpoint.num_bytes:,} bytes and the disk has {free:,} free",
                fix="free some space, or give --out on a larger disk",
            )
        write_native(checkpoint, copy)
        shards = {entry.file for entry in checkpoint.stored.values()}
        skipped = shards | {CONFIG_FILE, INDEX_FILE, CHECKSUMS_FILE}
        for path in checkpoint.directory.iterdir():
            if path.is_file() and path.name not in skipped:
                shutil.copyfile(path, copy / path.name)
        log.info(checkpoint.describe_rounding())
        yield Checkpoint.open(copy)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
