"""How many bytes each part of the base takes, and in which format: printed, and checked against the recipe.

bitsandbytes' `load_in_4bit` leaves gpt-oss experts in bfloat16 without a word (facts: traps 3); this table is where
such a thing would show.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.errors import CheckError


@dataclass(frozen=True)
class StorageLine:
    """One part in one format: how many elements and bytes it takes."""

    part: str
    format: str
    num_bytes: int


def storage_table(model: nn.Module) -> list[StorageLine]:
    """Bytes by part and format, largest first. LoRA parameters are counted as `adapter`."""
    sizes: Counter[tuple[str, str]] = Counter()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        sizes[_part(name), _format(name, tensor)] += tensor.numel() * tensor.element_size()
    return [StorageLine(part, form, size) for (part, form), size in sizes.most_common()]


def describe_storage(lines: list[StorageLine]) -> str:
    """The table as text, one line a part."""
    return "\n".join(f"  {_readable(line.num_bytes):>11}  {line.part:<16} {line.format}" for line in lines)


def check_expert_storage(lines: list[StorageLine], wanted: str) -> None:
    """Refuse a base whose expert weights are not all held as the recipe says.

    Raises:
        CheckError: names the formats found.
    """
    formats = {line.format for line in lines if line.part == "expert weights"}
    if formats != {wanted}:
        raise CheckError(
            f"expert weights are held as {', '.join(sorted(formats)) or 'nothing'}, the recipe says {wanted}",
            why="a dense copy of the experts takes 38 GB (20b) or 229 GB (120b)",
        )


def _readable(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 2**10:.2f} KiB"


def _part(name: str) -> str:
    match name:
        case _ if "lora" in name:
            return "adapter"
        case _ if ".experts." in name and name.endswith("_bias"):
            return "expert biases"
        case _ if ".experts." in name:
            return "expert weights"
        case _ if ".router." in name:
            return "router"
        case _ if ".self_attn." in name:
            return "attention"
        case _ if "embed_tokens" in name:
            return "input embedding"
        case _ if "lm_head" in name:
            return "output head"
        case _:
            return "norms and rotary"


def _format(name: str, tensor: Tensor) -> str:
    if name.endswith(("_blocks", "_scales")) and tensor.dtype == torch.uint8:
        return "mxfp4"
    return str(tensor.dtype).removeprefix("torch.")
