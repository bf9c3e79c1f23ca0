"""The module that replaces transformers' experts: frozen weights in one of three storage formats, LoRA inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.kernels.choice import ExpertDims, ExpertKernel, KernelChoice, choose_expert_kernel, expert_block_of
from finetune.kernels.dispatch import LoraExperts
from finetune.kernels.experts import (
    ExpertBlock,
    ExpertWeights,
    FrozenExperts,
    LoraFactors,
    Mxfp4Experts,
    expert_block,
)
from finetune.model.nf4 import NF4_BLOCK, Nf4Experts
from finetune.model.storage import ExpertStorage
from finetune.mxfp4.format import BLOCK

PUBLISHED_SIGMOID_GAIN = 1.702  # config.json does not carry it; transformers' class default is the same


class ExpertUpdates(Protocol):
    """LoRA of one layer's experts; each projection's is None while the adapter is disabled.

    Attributes:
        adapted: the experts that have LoRA. None: all.
    """

    adapted: LoraExperts | None

    def gate_up(self) -> LoraFactors | None:
        """LoRA of gate_up_proj."""

    def down(self) -> LoraFactors | None:
        """LoRA of down_proj."""


@dataclass(frozen=True)
class DenseExperts:
    """E frozen linear maps in bfloat16: the values of MXFP4, which bfloat16 represents exactly.

    Attributes:
        weight: bfloat16 [E, out, in].
        bias: [E, out], in the compute dtype.
    """

    weight: Tensor
    bias: Tensor

    def dequantised(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Weights of experts `first` to `last` (exclusive) as [C, out, in]; in bfloat16 they are not copied."""
        return self.weight[first:last].to(dtype)


class PackedExperts(nn.Module):
    """All routed experts of one layer, frozen.

    In `mxfp4` the buffers have the checkpoint's own names, so that the module's state is the file's content:
    `gate_up_proj_blocks` uint8 [E, 2F, D/32, 16], `gate_up_proj_scales` uint8 [E, 2F, D/32], `gate_up_proj_bias`
    [E, 2F], and the same for `down_proj` with D and F exchanged ([E, D, F/32, 16] and so on). In `nf4` there are
    `_nf4_codes` uint8 [E, 2F, D/2] and `_nf4_scales` float32 [E, 2F · D/64] instead, in `bfloat16` `_dense`
    bfloat16 [E, 2F, D].

    Args:
        num_experts, hidden, width: E, D and F.
        limit: clamp of the activation, from config.json.
        experts_per_chunk: experts dequantised at a time.
        storage: storage format of the weights.

    Attributes:
        shapes: [E, out, in] of each projection, by name.
        kernel: name of the kernel in use, `triton` or `reference`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        width: int,
        limit: float,
        experts_per_chunk: int,
        storage: ExpertStorage = "mxfp4",
    ) -> None:
        super().__init__()
        self.limit, self.experts_per_chunk, self.storage = limit, experts_per_chunk, storage
        self.shapes = {
            "gate_up_proj": (num_experts, 2 * width, hidden),
            "down_proj": (num_experts, hidden, width),
        }
        for name, (experts, out, inputs) in self.shapes.items():
            if storage == "mxfp4":
                blocks = torch.empty(experts, out, inputs // BLOCK, BLOCK // 2, dtype=torch.uint8)
                self.register_buffer(f"{name}_blocks", blocks)
                self.register_buffer(f"{name}_scales", torch.empty(blocks.shape[:-1], dtype=torch.uint8))
            elif storage == "nf4":
                codes = torch.empty(experts, out, inputs // 2, dtype=torch.uint8)
                self.register_buffer(f"{name}_nf4_codes", codes)
                self.register_buffer(f"{name}_nf4_scales", torch.empty(experts, out * inputs // NF4_BLOCK))
            else:
                self.register_buffer(f"{name}_dense", torch.empty(experts, out, inputs, dtype=torch.bfloat16))
            self.register_buffer(f"{name}_bias", torch.empty(experts, out))
        self.lora: nn.Module | None = None
        self.kernel = "reference"
        self.block: ExpertBlock = expert_block

    def attach(self, lora: nn.Module) -> None:
        """Add an expert adapter (an `ExpertUpdates` module) to the computation."""
        self.lora = lora

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """[T, D], int64 [T, K], [T, K] -> [T, D]; argument names are transformers'.

        LoRA is applied in `finetune.kernels.experts._lora_linear`, or in `finetune.kernels.experts_fused`.
        """
        updates: ExpertUpdates | None = self.lora  # type: ignore[assignment]
        return self.block(
            hidden_states,
            router_indices,
            routing_weights,
            self._weights(),
            updates.gate_up() if updates else None,
            updates.down() if updates else None,
            updates.adapted if updates else None,
        )

    def _weights(self) -> ExpertWeights:
        gate_up, down = self.projection("gate_up_proj"), self.projection("down_proj")
        return ExpertWeights(gate_up, down, self.limit, PUBLISHED_SIGMOID_GAIN, self.experts_per_chunk)

    def projection(self, name: str) -> FrozenExperts:
        """The frozen maps of `gate_up_proj` or `down_proj`, as the expert block takes them."""

        def buffers(*endings: str) -> list[Tensor]:
            return [self.get_buffer(f"{name}_{ending}") for ending in endings]

        if self.storage == "mxfp4":
            return Mxfp4Experts(*buffers("blocks", "scales", "bias"))
        if self.storage == "nf4":
            return Nf4Experts(*buffers("nf4_codes", "nf4_scales", "bias"))
        return DenseExperts(*buffers("dense", "bias"))


def select_expert_kernel(model: nn.Module, wanted: ExpertKernel) -> KernelChoice:
    """Choose the expert kernel of a loaded base and use it from now on (a base is built with the reference).

    Args:
        model: a tree with `PackedExperts`, on its device and in its compute dtype.
        wanted: the recipe's `model.expert_kernel`.

    Raises:
        MachineError: the recipe demands a kernel that cannot be used here.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedExperts)]
    gate_up_bias, down_bias = layers[0].get_buffer("gate_up_proj_bias"), layers[0].get_buffer("down_proj_bias")
    dims = ExpertDims(down_bias.shape[1], gate_up_bias.shape[1] // 2, layers[0].experts_per_chunk)
    choice = choose_expert_kernel(wanted, dims, down_bias.device, down_bias.dtype)
    for layer in layers:
        layer.kernel, layer.block = choice.kernel, expert_block_of(choice.kernel)
    return choice


def expert_kernel(model: nn.Module) -> str:
    """The expert kernel in use, `triton` or `reference`."""
    return next(module.kernel for module in model.modules() if isinstance(module, PackedExperts))
