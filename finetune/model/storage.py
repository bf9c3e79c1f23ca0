"""How many bytes each part of the base takes, and in which format: printed, and checked against the recipe.

bitsandbytes' `load_in_4bit` leaves gpt-oss experts in bfloat16 without a word (facts: traps 3); this table is where
such a thing would show.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from finetune.config.schema import ModelConfig
from finetune.errors import CheckError

ExpertStorage = Literal["mxfp4", "nf4", "bfloat16"]
AttentionStorage = Literal["compute", "nf4"]


@dataclass(frozen=True)
class BaseStorage:
    """How a base is to be held; the defaults hold what the checkpoint does.

    Attributes:
        experts, attention: format of the weights, see `finetune.config.schema.ModelConfig`.
        embedding_on_cpu: the input embedding stays in host memory.
    """

    experts: ExpertStorage = "mxfp4"
    attention: AttentionStorage = "compute"
    embedding_on_cpu: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> BaseStorage:
        """What a recipe asks for."""
        return cls(config.expert_storage, config.attention_storage, config.embedding_on_cpu)

    @property
    def rounded(self) -> dict[str, str]:
        """Parts whose values are not the checkpoint's, and their format."""
        held = {"experts": self.experts, "attention": self.attention}
        return {part: form for part, form in held.items() if form == "nf4"}


@dataclass(frozen=True)
class StorageLine:
    """One part in one format on one device: how many bytes it takes."""

    part: str
    format: str
    num_bytes: int
    device: str


def storage_table(model: nn.Module) -> list[StorageLine]:
    """Bytes by part, format and device, largest first. LoRA parameters are counted as `adapter`."""
    sizes: Counter[tuple[str, str, str]] = Counter()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        sizes[_part(name), _format(name, tensor), tensor.device.type] += tensor.numel() * tensor.element_size()
    return [StorageLine(part, form, size, device) for (part, form, device), size in sizes.most_common()]


def describe_storage(lines: list[StorageLine]) -> str:
    """The table as text, one line a part; devices are named if there are several."""
    several = len({line.device for line in lines}) > 1
    return "\n".join(
        f"  {_readable(line.num_bytes):>11}  {line.part:<24} {line.format}{f' on {line.device}' if several else ''}"
        for line in lines
    )


def check_storage(lines: list[StorageLine], wanted: BaseStorage) -> None:
    """Refuse a base that is not held as the recipe says.

    Raises:
        CheckError: names the formats or devices found.
    """
    check_expert_storage(lines, wanted.experts)
    attention = {line.format for line in lines if line.part == "attention weights"}
    if (attention == {"nf4"}) != (wanted.attention == "nf4"):
        raise CheckError(
            f"attention weights are held as {', '.join(sorted(attention))}, the recipe says {wanted.attention}"
        )
    embedding = {line.device for line in lines if line.part == "input embedding"}
    if wanted.embedding_on_cpu and embedding != {"cpu"}:
        raise CheckError(f"the input embedding is on {', '.join(sorted(embedding))}, the recipe says cpu")


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
        case _ if ".self_attn." in name and "_proj.weight" in name:
            return "attention weights"
        case _ if ".self_attn." in name:
            return "attention biases, sinks"
        case _ if "embed_tokens" in name:
            return "input embedding"
        case _ if "lm_head" in name:
            return "output head"
        case _:
            return "norms and rotary"


def _format(name: str, tensor: Tensor) -> str:
    if name.endswith(("_proj_blocks", "_proj_scales")) and tensor.dtype == torch.uint8:
        return "mxfp4"
    codes = name.endswith(("_nf4_codes", "_proj.weight")) and tensor.dtype == torch.uint8
    if codes or (name.endswith(("_nf4_scales", "_proj.weight_scales")) and tensor.dtype == torch.float32):
        return "nf4"
    return str(tensor.dtype).removeprefix("torch.")
