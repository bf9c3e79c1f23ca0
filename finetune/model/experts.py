"""The module that stands where transformers has its experts: MXFP4 bytes as the checkpoint has them, LoRA inside."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.kernels.experts import ExpertWeights, LoraFactors, PackedLinear, expert_block
from finetune.kernels.experts_choice import (
    Block,
    ExpertChoice,
    ExpertKernel,
    ExpertShape,
    choose_expert_kernel,
    expert_block_of,
)
from finetune.mxfp4.format import BLOCK

PUBLISHED_SIGMOID_GAIN = 1.702  # config.json does not carry it; transformers' class default is the same


class ExpertUpdates(Protocol):
    """What an expert adapter offers: the updates of both projections, None while it is switched off."""

    def gate_up(self) -> LoraFactors | None:
        """Update of gate_up_proj."""

    def down(self) -> LoraFactors | None:
        """Update of down_proj."""


class PackedExperts(nn.Module):
    """All routed experts of one layer, frozen in MXFP4.

    Buffers carry the checkpoint's own names, so that the module's state is the file's content:
    `gate_up_proj_blocks` uint8 [E, 2F, D/32, 16], `gate_up_proj_scales` uint8 [E, 2F, D/32], `gate_up_proj_bias`
    [E, 2F], and the same for `down_proj` with D and F exchanged ([E, D, F/32, 16] and so on).

    Args:
        num_experts, hidden, width: E, D and F.
        limit: clamp of the activation, from config.json.
        experts_per_chunk: experts dequantised at a time.
    """

    def __init__(self, num_experts: int, hidden: int, width: int, limit: float, experts_per_chunk: int) -> None:
        super().__init__()
        self.limit, self.experts_per_chunk = limit, experts_per_chunk
        for name, out, inputs in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            blocks = torch.empty(num_experts, out, inputs // BLOCK, BLOCK // 2, dtype=torch.uint8)
            self.register_buffer(f"{name}_blocks", blocks)
            self.register_buffer(f"{name}_scales", torch.empty(blocks.shape[:-1], dtype=torch.uint8))
            self.register_buffer(f"{name}_bias", torch.empty(num_experts, out))
        self.lora: nn.Module | None = None
        self.kernel = "reference"
        self.block: Block = expert_block

    def attach(self, lora: nn.Module) -> None:
        """Put an expert adapter (an `ExpertUpdates` module) into the computation."""
        self.lora = lora

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """[T, D], int64 [T, K], [T, K] -> [T, D]; argument names are transformers'."""
        updates: ExpertUpdates | None = self.lora  # type: ignore[assignment]
        return self.block(
            hidden_states,
            router_indices,
            routing_weights,
            self._weights(),
            updates.gate_up() if updates else None,
            updates.down() if updates else None,
        )

    def _weights(self) -> ExpertWeights:
        def packed(name: str) -> PackedLinear:
            return PackedLinear(*(getattr(self, f"{name}_{part}") for part in ("blocks", "scales", "bias")))

        return ExpertWeights(
            packed("gate_up_proj"), packed("down_proj"), self.limit, PUBLISHED_SIGMOID_GAIN, self.experts_per_chunk
        )


def select_expert_kernel(model: nn.Module, wanted: ExpertKernel) -> ExpertChoice:
    """Choose the kernel for a loaded base and use it from now on (a base is loaded with the reference).

    Args:
        model: a tree with `PackedExperts`, on its device and in its compute dtype.
        wanted: the recipe's `model.expert_kernel`.

    Returns:
        What was chosen and why, to be said to the person.

    Raises:
        MachineError: the recipe demands a kernel that cannot be used here.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedExperts)]
    gate_up_bias, down_bias = layers[0].get_buffer("gate_up_proj_bias"), layers[0].get_buffer("down_proj_bias")
    shape = ExpertShape(down_bias.shape[1], gate_up_bias.shape[1] // 2, layers[0].experts_per_chunk)
    choice = choose_expert_kernel(wanted, shape, down_bias.device, down_bias.dtype)
    for layer in layers:
        layer.kernel, layer.block = choice.kernel, expert_block_of(choice.kernel)
    return choice


def expert_kernel(model: nn.Module) -> str:
    """The kernel in use, `triton` or `reference`."""
    return next(module.kernel for module in model.modules() if isinstance(module, PackedExperts))
