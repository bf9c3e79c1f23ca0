"""Failures that end an optimiser step before its update, and the evidence kept of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.data.batches import Batch
from finetune.errors import CheckError
from finetune.files import write_json
from finetune.model.identity import tensor_digest
from finetune.train.world import World

EXAMPLES_NAMED = 12


class OutOfMemory(Exception):
    """A rank ran out of memory in a step. `cause`: this rank's error, None if it was another's."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__(str(cause))
        self.cause = cause


class NotFinite(CheckError):
    """A loss or gradient is not finite, found before the update: through clipping, one NaN makes every gradient NaN.

    Args:
        what: the first line of the message.
        terms: of each micro-batch of this rank, [terms] each.
        batches: these micro-batches.
        world: all ranks raise this error together.

    Attributes:
        culprits: by rank, the ids of the examples in micro-batches whose own terms are not finite; of all the step's
            examples where only the gradient is not.
    """

    def __init__(self, what: str, terms: Sequence[Tensor], batches: Sequence[Batch], world: World) -> None:
        mine = [batch for batch, values in zip(batches, terms, strict=True) if not torch.isfinite(values).all()]
        found = world.all_gather(_ids(mine))
        if not any(found):
            found = world.all_gather(_ids(batches))
        self.culprits: dict[int, list[str]] = {rank: ids for rank, ids in enumerate(found) if ids}
        named = "; ".join(
            (f"rank {rank}: " if world.world_size > 1 else "") + _first_of(ids) for rank, ids in self.culprits.items()
        )
        super().__init__(
            what,
            why=f"no update was made from it; its examples: {named}",
            fix="lower trainer.learning_rate, or look at those examples; resume from the last checkpoint",
        )


def named_examples(batches: Sequence[Batch]) -> str:
    """The ids of the first few examples."""
    return _first_of(_ids(batches))


def _ids(batches: Sequence[Batch]) -> list[str]:
    return [name for batch in batches for sequence in batch.example_ids for name in sequence]


def _first_of(ids: list[str]) -> str:
    return ", ".join(ids[:EXAMPLES_NAMED]) + (" ..." if len(ids) > EXAMPLES_NAMED else "")


def write_evidence(
    directory: Path,
    error: NotFinite,
    batches: Sequence[Batch],
    adapter: Mapping[str, Tensor] | None,
    *,
    rank: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Write what reproduces a step that was not finite: every rank's micro-batches, and once the adapter and settings.

    Args:
        directory: shared by the ranks; made if missing.
        error: of the step.
        batches: this rank's micro-batches: `NUMBER.input_ids`, `.weights`, `.positions` and `.segments` in
            process-RANK.safetensors.
        adapter: before the update, by the parameter names of checkpoints; None on all ranks but one.
        rank: of this process.
        learning_rate, seed: of the step and the run; go to facts.json beside the adapter.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{number}.{name}": getattr(batch, name).contiguous()
        for number, batch in enumerate(batches)
        for name in ("input_ids", "weights", "positions", "segments")
    }
    save_file(tensors, directory / f"process-{rank}.safetensors")
    if adapter is not None:
        save_file(dict(adapter), directory / "adapter.safetensors")
        facts = {"error": str(error), "rows": error.culprits, "learning_rate": learning_rate, "seed": seed}
        write_json(directory / "facts.json", facts)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of tensors."""
    lines = "".join(f"{name} {tensor_digest(tensor)}\n" for name, tensor in sorted(tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
