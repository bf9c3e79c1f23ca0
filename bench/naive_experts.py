"""Two other ways to compute the expert block, for comparison in `bench/expert_block.py`.

`naive_block` is the straightforward version over packed weights: every projection dequantises in the forward pass, in
its recomputation and for the gradient of its input (three times), with base, bias and update as passes of their own.
`PeftExperts` is PEFT's `target_parameters` on transformers' own experts in dense weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from finetune.kernels.dispatch import Chunk, Dispatch
from finetune.kernels.experts import ExpertWeights, FrozenExperts, LoraFactors, clamped_swiglu
from finetune.kernels.grouped import padded_rank


class _PackedProduct(torch.autograd.Function):
    """Product with packed weights; keeps nothing dequantised."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, base: FrozenExperts, chunk: Chunk) -> Tensor:
        ctx.base, ctx.chunk = base, chunk
        matrices = base.dequantised(chunk.first, chunk.last, rows.dtype)
        return F.grouped_mm(rows, matrices.transpose(1, 2), offs=chunk.offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        matrices = ctx.base.dequantised(ctx.chunk.first, ctx.chunk.last, grad.dtype)
        return F.grouped_mm(grad.contiguous(), matrices, offs=ctx.chunk.offsets), None, None


def _linear(rows: Tensor, base: FrozenExperts, lora: LoraFactors, chunk: Chunk) -> Tensor:
    out = _PackedProduct.apply(rows, base, chunk)
    out = out + base.bias[chunk.experts][chunk.expert_of_routed()]
    a, b = padded_rank(lora.a[chunk.experts].to(rows.dtype), 1), padded_rank(lora.b[chunk.experts].to(rows.dtype), 2)
    inner = F.grouped_mm(rows, a.transpose(1, 2), offs=chunk.offsets) * lora.scale
    return out + F.grouped_mm(inner, b.transpose(1, 2), offs=chunk.offsets)


def naive_block(
    x: Tensor, ids: Tensor, mix: Tensor, weights: ExpertWeights, gate_up_lora: LoraFactors, down_lora: LoraFactors
) -> Tensor:
    """As `finetune.kernels.experts.expert_block`."""
    dispatch = Dispatch.of(ids, len(weights.gate_up.bias), weights.experts_per_chunk)
    token = dispatch.order // dispatch.top_k

    def through(rows: Tensor, chunk: Chunk) -> Tensor:
        hidden = _linear(rows, weights.gate_up, gate_up_lora, chunk)
        return _linear(clamped_swiglu(hidden, weights.limit, weights.gain), weights.down, down_lora, chunk)

    parts = [
        checkpoint(through, x[token[chunk.routed]], chunk, use_reentrant=False, determinism_check="none")
        for chunk in dispatch.chunks()
    ]
    rows = torch.cat(parts) * mix.reshape(-1)[dispatch.order][:, None]
    return rows[dispatch.inverse_order()].view(*ids.shape, -1).sum(1)


class PeftExperts(nn.Module):
    """transformers' experts with grouped products, dense weights, and PEFT's LoRA on both parameters.

    Args:
        weights: packed experts, dequantised here once. lora: updates of gate_up and down, of one rank and scale.
    """

    def __init__(self, weights: ExpertWeights, lora: tuple[LoraFactors, LoraFactors], top_k: int) -> None:
        super().__init__()
        bias = weights.down.bias
        experts, hidden, width = *bias.shape, weights.gate_up.bias.shape[1] // 2
        config = GptOssConfig(
            num_local_experts=experts, hidden_size=hidden, intermediate_size=width, num_experts_per_tok=top_k
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = GptOssExperts(config)
        state = {}
        for name, base in (("gate_up_proj", weights.gate_up), ("down_proj", weights.down)):
            state[name] = base.dequantised(0, experts, bias.dtype).transpose(1, 2).contiguous()
            state[name + "_bias"] = base.bias
        module.load_state_dict(state, assign=True)
        holder = nn.Module()
        holder.experts = module
        rank = lora[0].a.shape[1]
        settings = LoraConfig(
            r=rank,
            lora_alpha=lora[0].scale * rank,
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        self.holder = get_peft_model(holder, settings)
        self._fill(lora)

    def _fill(self, lora: tuple[LoraFactors, LoraFactors]) -> None:
        """PEFT's A is [E · L, in], its B [out, L · E] with the rank outermost; `base_layer` wraps gate_up."""
        for name, parameter in self.trained().items():
            factors = lora[0] if "base_layer" in name else lora[1]
            with torch.no_grad():
                if "lora_A" in name:
                    parameter.copy_(factors.a.reshape(parameter.shape))
                else:
                    parameter.copy_(factors.b.permute(1, 2, 0).reshape(parameter.shape))

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.holder.named_parameters() if p.requires_grad}

    def forward(self, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        out: Tensor = self.holder.base_model.model.experts(x, ids, mix)
        return out
