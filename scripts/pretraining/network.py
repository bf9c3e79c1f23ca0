"""The tiny base while it is pretrained: transformers' gpt-oss over the corpus's own vocabulary, experts trainable.

A token that occurs fewer than five times in the corpus belongs to the *rest*, one row that represents all of them. In
the checkpoint each of them gets that row plus noise of its own (`HEAD_NOISE`), so that fine-tuning can tell them apart;
the loss counts all of them, noise included, so that probabilities over the published 201,088 tokens are right.

Shape suffixes: N predicted tokens, T tokens, D hidden, F expert width, E experts, K active ones, C corpus vocabulary
with the rest as its last row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import GptOssConfig, GptOssForCausalLM

from finetune.kernels.experts import clamped_swiglu
from finetune.model.attention import register_attention
from finetune.mxfp4.format import dequantise, quantise

VOCABULARY = 201_088
_TOKENS_PER_CHUNK = 256


class TrainableExperts(nn.Module):
    """All experts of a layer in the checkpoint's orientation, [E, out, in], trained in float32.

    Args:
        config: sizes.
        rounded: see `GptOss.rounded`.
    """

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.limit, self.num_experts = config.swiglu_limit, experts
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden) * hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * width))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) * 0.5 * width**-0.5)
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.rounded = False

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """[T, D], int64 [T, K], [T, K] -> [T, D]; argument names are transformers'."""
        num_active = router_indices.shape[1]
        expert_of_row, order = router_indices.reshape(-1).sort(stable=True)
        token_of_row = order // num_active
        offsets = torch.bincount(expert_of_row, minlength=self.num_experts).cumsum(0).to(torch.int32)
        rows = hidden_states.index_select(0, token_of_row)
        rows = F.grouped_mm(rows, self._weights(self.gate_up_proj).transpose(1, 2), offs=offsets)
        rows = clamped_swiglu(rows + self.gate_up_proj_bias[expert_of_row], self.limit, 1.702)
        rows = F.grouped_mm(rows, self._weights(self.down_proj).transpose(1, 2), offs=offsets)
        rows = rows + self.down_proj_bias[expert_of_row]
        rows = rows * routing_weights.reshape(-1)[order][:, None]
        return torch.zeros_like(hidden_states).index_add(0, token_of_row, rows)

    def _weights(self, weights: Tensor) -> Tensor:
        """Rounded to MXFP4 once `rounded` is set; gradients pass straight through."""
        if not self.rounded:
            return weights
        with torch.no_grad():
            difference = dequantise(*quantise(weights), torch.float32) - weights
        return weights + difference


def build(config: dict[str, Any], vocabulary: int, seed: int) -> GptOssForCausalLM:
    """A network with random weights.

    Args:
        config: config.json's content.
        vocabulary: C.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    sizes = GptOssConfig(**{**config, "vocab_size": vocabulary, "quantization_config": None})
    sizes._attn_implementation = register_attention()
    sizes.pad_token_id = None
    model = GptOssForCausalLM(sizes)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight") or name.endswith("router.weight"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if name.endswith("o_proj.weight"):
            parameter.data *= 0.5
        if name.endswith("sinks"):
            nn.init.zeros_(parameter)
    for layer in model.model.layers:
        layer.mlp.experts = TrainableExperts(sizes)
    nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    nn.init.normal_(model.lm_head.weight, std=0.5 * sizes.hidden_size**-0.5)
    return model


def corpus_nll(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, num_rest: int, noise: float) -> Tensor:
    """Sum of weight x NLL in nats of targets among all 201,088 tokens.

    The rest's `num_rest` tokens have logits r + noise of variance noise^2 |hidden|^2; their expected share of the
    denominator is num_rest * exp(r + that variance / 2).

    Args:
        hidden: [N, D]. head: [C, D], the rest last. targets: int64 [N] below C.
        weights: float32 [N].
        num_rest: tokens that the last row stands for.
        noise: standard deviation of what the checkpoint adds to each number of their rows.

    Returns:
        A scalar; gradients reach `hidden` and `head`.
    """
    return _CorpusNll.apply(hidden, head, targets, weights, num_rest, noise)


class _CorpusNll(torch.autograd.Function):
    """Chunks small enough for the cache; the gradient is formed in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, num_rest, noise):  # type: ignore[no-untyped-def]
        total = hidden.new_zeros(())
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        rest = head.shape[0] - 1
        for start in range(0, len(hidden), _TOKENS_PER_CHUNK):
            here = slice(start, start + _TOKENS_PER_CHUNK)
            rows, wanted, weight = hidden[here], targets[here], weights[here, None]
            logits = rows @ head.T
            target_logits = logits.gather(1, wanted[:, None])
            logits[:, rest] += math.log(num_rest) + 0.5 * noise**2 * rows.square().sum(1)
            largest = logits.amax(1, keepdim=True)
            probabilities = logits.sub_(largest).exp_()
            sums = probabilities.sum(1, keepdim=True)
            total += (weight * (sums.log() + largest - target_logits)).sum()
            probabilities *= weight / sums
            rest_share = probabilities[:, rest, None].clone()
            probabilities[torch.arange(len(rows)), wanted] -= weight[:, 0]
            grad_hidden[here] = probabilities @ head + rest_share * noise**2 * rows
            grad_head.addmm_(probabilities.T, rows)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None, None, None, None
