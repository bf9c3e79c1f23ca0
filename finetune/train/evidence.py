"""What is kept of a step whose numbers were not finite, and a short name for an adapter's numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from finetune.data.batches import Batch
from finetune.model.identity import tensor_digest
from finetune.train.run_directory import write_json


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
