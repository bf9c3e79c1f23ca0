"""Storage formats of a base: conversion while it is read, and a table of the bytes of each part, checked afterwards.

Tensors are converted one at a time: none exists whole in a third format between the checkpoint's and its own. Experts
are converted one by one, on the device that will store them.

bitsandbytes' `load_in_4bit` leaves gpt-oss experts in bfloat16 without a warning; the table is where that would show.

Shape suffixes: E experts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.arch import ATTENTION_PROJECTIONS, EMBEDDING
from finetune.config.schema import ModelConfig
from finetune.errors import CheckError
from finetune.model.nf4 import NF4_BLOCK, dequantise_nf4, quantise_nf4
from finetune.mxfp4.format import BLOCK, dequantise

ExpertStorage = Literal["mxfp4", "nf4", "bfloat16"]
AttentionStorage = Literal["compute", "nf4"]
_ATTENTION = tuple(f".self_attn.{name}.weight" for name in ATTENTION_PROJECTIONS)


@dataclass(frozen=True)
class BaseStorage:
    """Storage formats of a base; the defaults are the checkpoint's own.

    Attributes:
        experts, attention: format of the weights, see `finetune.config.schema.ModelConfig`.
        embedding_on_cpu: the input embedding stays in host memory.
    """

    experts: ExpertStorage = "mxfp4"
    attention: AttentionStorage = "compute"
    embedding_on_cpu: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> BaseStorage:
        """The formats that a recipe asks for."""
        return cls(config.expert_storage, config.attention_storage, config.embedding_on_cpu)

    @property
    def rounded(self) -> dict[str, str]:
        """Parts whose values differ from the checkpoint's, and their format."""
        formats = {"experts": self.experts, "attention": self.attention}
        return {part: form for part, form in formats.items() if form == "nf4"}


class StorageConverter:
    """Converts tensors of a checkpoint to a storage format.

    Args:
        device: of the model.
        dtype: of everything that is not packed.
        storage: the recipe's formats.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, storage: BaseStorage) -> None:
        self.device, self.dtype, self.storage = device, dtype, storage
        self._blocks: dict[str, Tensor] = {}
        self._errors: dict[str, tuple[float, float]] = {}

    def convert(self, name: str, stored: Tensor) -> dict[str, Tensor]:
        """Convert one tensor of the native layout.

        Args:
            name: of the tensor; an expert projection's `_blocks` come before its `_scales`.
            stored: as in the checkpoint, on the CPU. Not written to.

        Returns:
            Tensors by their name in the model's state; none for blocks, which wait for their scales.
        """
        if name == EMBEDDING and self.storage.embedding_on_cpu:
            return {name: stored.clone()}  # memory of its own: mapped pages could be dropped while training
        if self.storage.attention == "nf4" and name.endswith(_ATTENTION):
            weights = stored.to(self.device)
            codes, scales = quantise_nf4(weights)
            self._add_error("attention", weights, dequantise_nf4(codes, scales, torch.float32))
            return {name: codes, f"{name}_scales": scales}
        if stored.dtype != torch.uint8:
            return {name: stored.to(self.device, self.dtype)}
        if self.storage.experts == "mxfp4":
            return {name: stored.to(self.device)}
        if name.endswith("_blocks"):
            self._blocks[name] = stored
            return {}
        projection = name.removesuffix("_scales")
        blocks = self._blocks.pop(f"{projection}_blocks").to(self.device)
        return self._convert_experts(projection, blocks, stored.to(self.device))

    def rounding_errors(self) -> dict[str, float]:
        """Relative RMS, by part, of the change that NF4 made in the values; empty if nothing is in NF4."""
        return {part: (lost / total) ** 0.5 if total else 0.0 for part, (lost, total) in self._errors.items()}

    def _convert_experts(self, projection: str, blocks: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """A projection's experts in the format asked for, one expert after another."""
        num_experts, out, inputs = (*blocks.shape[:2], blocks.shape[2] * BLOCK)
        if self.storage.experts == "bfloat16":
            dense = torch.empty(num_experts, out, inputs, dtype=torch.bfloat16, device=self.device)
            for expert in range(num_experts):
                dequantise(blocks[expert], scales[expert], out=dense[expert])
            return {f"{projection}_dense": dense}
        codes = torch.empty(num_experts, out, inputs // 2, dtype=torch.uint8, device=self.device)
        factors = torch.empty(num_experts, out * inputs // NF4_BLOCK, device=self.device)
        for expert in range(num_experts):
            weights = dequantise(blocks[expert], scales[expert])
            codes[expert], factors[expert] = quantise_nf4(weights)
            self._add_error("experts", weights, dequantise_nf4(codes[expert], factors[expert], torch.float32))
        return {f"{projection}_nf4_codes": codes, f"{projection}_nf4_scales": factors}

    def _add_error(self, part: str, weights: Tensor, rounded: Tensor) -> None:
        lost, total = self._errors.get(part, (0.0, 0.0))
        weights = weights.float()
        self._errors[part] = (
            lost + float((weights - rounded).square().sum()),
            total + float(weights.square().sum()),
        )


class CpuEmbedding(nn.Embedding):
    """The input embedding in host memory, in the checkpoint's dtype; a micro-batch's vectors are copied at once.

    Args:
        base: the embedding it replaces, which gives the sizes.
        device: of the result.
        dtype: of the result; widening after the look-up gives the same bits as before it.
    """

    def __init__(self, base: nn.Embedding, device: torch.device, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.padding_idx, self.weight = base.padding_idx, base.weight
        self.device, self.dtype = device, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D] on the device. Ids that are on the host already spare a wait for the device."""
        vectors = F.embedding(ids.cpu(), self.weight)
        if self.device.type == "cuda":  # from pinned memory the copy does not block the host
            vectors = vectors.pin_memory()
        return vectors.to(self.device, non_blocking=True).to(self.dtype)


# The table of what is stored


@dataclass(frozen=True)
class StorageLine:
    """Bytes of one part of the model in one format on one device."""

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
    """The table as text, one line per part; devices are named if there are several."""
    several = len({line.device for line in lines}) > 1
    return "\n".join(
        f"  {_readable(line.num_bytes):>11}  {line.part:<24} {line.format}{f' on {line.device}' if several else ''}"
        for line in lines
    )


def check_storage(lines: list[StorageLine], wanted: BaseStorage) -> None:
    """Refuse a base that is not stored as the recipe says.

    Raises:
        CheckError: names the formats or devices found.
    """
    check_expert_storage(lines, wanted.experts)
    attention = {line.format for line in lines if line.part == "attention weights"}
    if (attention == {"nf4"}) != (wanted.attention == "nf4"):
        raise CheckError(
            f"attention weights are stored as {', '.join(sorted(attention))}, the recipe says {wanted.attention}"
        )
    embedding = {line.device for line in lines if line.part == "input embedding"}
    if wanted.embedding_on_cpu and embedding != {"cpu"}:
        raise CheckError(f"the input embedding is on {', '.join(sorted(embedding))}, the recipe says cpu")


def check_expert_storage(lines: list[StorageLine], wanted: str) -> None:
    """Refuse a base whose expert weights are not all stored as the recipe says.

    Raises:
        CheckError: names the formats found.
    """
    formats = {line.format for line in lines if line.part == "expert weights"}
    if formats != {wanted}:
        raise CheckError(
            f"expert weights are stored as {', '.join(sorted(formats)) or 'nothing'}, the recipe says {wanted}",
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
