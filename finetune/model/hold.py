"""From a tensor as the checkpoint has it to the tensors that the base holds of it.

One tensor at a time: what is converted never exists whole in another format than the one it comes from and the one it
goes to. Experts are converted one by one, on the device that will hold them.

Shape suffixes: E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.model.nf4 import NF4_BLOCK, dequantise_nf4, quantise_nf4
from finetune.model.storage import BaseStorage
from finetune.mxfp4.format import BLOCK, dequantise

EMBEDDING = "model.embed_tokens.weight"
_ATTENTION = tuple(f".self_attn.{name}_proj.weight" for name in "qkvo")


class Holder:
    """Turns stored tensors into held ones.

    Args:
        device: of the model.
        dtype: of everything that is not packed.
        storage: what the recipe asks for.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, storage: BaseStorage) -> None:
        self.device, self.dtype, self.storage = device, dtype, storage
        self._blocks: dict[str, Tensor] = {}
        self._errors: dict[str, tuple[float, float]] = {}

    def hold(self, name: str, stored: Tensor) -> dict[str, Tensor]:
        """What the model holds of one tensor of the native layout.

        Args:
            name: of the tensor; an expert projection's `_blocks` come before its `_scales`.
            stored: as the checkpoint has it, on the CPU. Not written to.

        Returns:
            Held tensors by their name in the model's state; none for blocks that wait for their scales.
        """
        if name == EMBEDDING and self.storage.embedding_on_cpu:
            return {name: stored.clone()}  # memory of its own: mapped pages could be dropped while training
        if self.storage.attention == "nf4" and name.endswith(_ATTENTION):
            weights = stored.to(self.device)
            codes, scales = quantise_nf4(weights)
            self._count("attention", weights, dequantise_nf4(codes, scales, torch.float32))
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
        return self._experts(projection, blocks, stored.to(self.device))

    def rounding_errors(self) -> dict[str, float]:
        """Relative RMS, by part, of what NF4 changed in the values that were read; empty if nothing is NF4."""
        return {part: (lost / total) ** 0.5 if total else 0.0 for part, (lost, total) in self._errors.items()}

    def _experts(self, projection: str, blocks: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """A projection's experts in the storage asked for, one expert after the other."""
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
            self._count("experts", weights, dequantise_nf4(codes[expert], factors[expert], torch.float32))
        return {f"{projection}_nf4_codes": codes, f"{projection}_nf4_scales": factors}

    def _count(self, part: str, weights: Tensor, rounded: Tensor) -> None:
        lost, total = self._errors.get(part, (0.0, 0.0))
        weights = weights.float()
        self._errors[part] = (
            lost + float((weights - rounded).square().sum()),
            total + float(weights.square().sum()),
        )


class HostEmbedding(nn.Embedding):
    """The input embedding in host memory, in the checkpoint's dtype; rows of a micro-step go over in one transfer.

    Args:
        base: the embedding it replaces; its sizes count.
        device: where rows are wanted.
        dtype: of the rows; widening after the look-up gives the same bits as before it.
    """

    def __init__(self, base: nn.Embedding, device: torch.device, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.padding_idx, self.weight = base.padding_idx, base.weight
        self.device, self.dtype = device, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D] on the device. Ids that are on the host already spare a wait for the device."""
        rows = F.embedding(ids.cpu(), self.weight)
        if self.device.type == "cuda":  # from pinned memory the copy does not hold up the host
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True).to(self.dtype)
