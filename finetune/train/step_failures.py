"""What ends an optimiser step before its update, and whose rows were in it."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.data.batches import Batch
from finetune.errors import CheckError
from finetune.train.processes import Processes

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

    def __init__(self, what: str, sums: list[Tensor], batches: list[Batch], processes: Processes) -> None:
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
    return [name for batch in batches for row in batch.sample_ids for name in row]


def _first_of(ids: list[str]) -> str:
    return ", ".join(ids[:SAMPLES_NAMED]) + (" ..." if len(ids) > SAMPLES_NAMED else "")
