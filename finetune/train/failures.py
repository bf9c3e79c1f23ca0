"""What ends an optimiser step before its update, and whose rows were in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.data.batches import Batch
from finetune.errors import CheckError
from finetune.files import write_json
from finetune.model.identity import tensor_digest
from finetune.train.world import World

SAMPLES_NAMED = 12


class OutOfMemory(Exception):
    """Some process ran out of memory in a step. `cause`: this one's error, None if it was another's."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__(str(cause))
        self.cause = cause


class NotFinite(CheckError):
    """A step whose loss or gradient is not finite, seen before the update: through clipping, one NaN makes all NaN.

    Args:
        what: the first line of the message.
        sums: each micro-step's terms, of this process.
        batches: its micro-steps.
        processes: who takes part; all of them make this error together.

    Attributes:
        culprits: by process, the ids of the rows in micro-steps whose own terms were not finite; all of the step's
            where only the gradient was not.
    """

    def __init__(self, what: str, sums: list[Tensor], batches: list[Batch], processes: World) -> None:
        mine = [batch for batch, terms in zip(batches, sums, strict=True) if not torch.isfinite(terms).all()]
        found = processes.gather(_ids(mine))
        if not any(found):
            found = processes.gather(_ids(batches))
        self.culprits: dict[int, list[str]] = {rank: ids for rank, ids in enumerate(found) if ids}
        named = "; ".join(
            (f"process {rank}: " if processes.count > 1 else "") + _first_of(ids) for rank, ids in self.culprits.items()
        )
        super().__init__(
            what,
            why=f"no update was made from it; its samples: {named}",
            fix="lower trainer.learning_rate, or look at those samples; resume from the last checkpoint",
        )


def named_rows(batches: list[Batch]) -> str:
    """The first few ids of the rows' samples."""
    return _first_of(_ids(batches))


def _ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for row in batch.example_ids for name in row]


def _first_of(ids: list[str]) -> str:
    return ", ".join(ids[:SAMPLES_NAMED]) + (" ..." if len(ids) > SAMPLES_NAMED else "")


# What is kept of a step whose numbers were not finite, and a short name for an adapter's numbers.


def write_evidence(
    directory: Path, process: int, batches: list[Batch], adapter: Mapping[str, Tensor] | None, facts: dict[str, Any]
) -> None:
    """Write a process's rows, and from one process the adapter and the facts.

    Args:
        directory: shared by the processes; made if it is not there.
        process: number of this one.
        batches: its micro-steps: `MICRO-STEP.input_ids`, `.weights`, `.positions` and `.segments` in
            process-N.safetensors.
        adapter: before the update, in the names of checkpoints; None in all processes but one.
        facts: go to facts.json beside it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{number}.{name}": getattr(batch, name).contiguous()
        for number, batch in enumerate(batches)
        for name in ("input_ids", "weights", "positions", "segments")
    }
    save_file(tensors, directory / f"process-{process}.safetensors")
    if adapter is not None:
        save_file(dict(adapter), directory / "adapter.safetensors")
        write_json(directory / "facts.json", facts)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes."""
    lines = "".join(f"{name} {tensor_digest(tensor)}\n" for name, tensor in sorted(tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
