"""What the device of a run is and how much of its memory is free, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetune.config.schema import ModelConfig
from finetune.model.build import choose_device


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory: all of it, and what is free or held by this process's allocator."""

    name: str
    total_bytes: int
    free_bytes: int


def gpu_memory(config: ModelConfig) -> GpuMemory | None:
    """Memory of the GPU that a recipe would use; None if it runs on the CPU.

    Raises:
        MachineError: the recipe demands a GPU and there is none.
    """
    device = choose_device(config)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(torch.cuda.get_device_name(device), total, free + torch.cuda.memory_reserved(device))
