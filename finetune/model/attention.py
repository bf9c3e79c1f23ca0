"""The parts of a transformers gpt-oss layer that are replaced besides its experts: attention and norms.

They have the same parameters under the same names, so that a checkpoint's tensors fit, and compute the same: attention
over packed sequences with sinks, by one of our kernels, and norms as one operation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssDecoderLayer

from finetune.kernels.attention import AttentionPlan
from finetune.kernels.cache import CachedAttention
from finetune.kernels.choice import (
    ATTENTION_KERNELS,
    AttentionDims,
    AttentionKernel,
    KernelChoice,
    choose_attention_kernel,
    rotary_obstacle,
)
from finetune.kernels.rotary import rotate

ATTENTION_NAME = "finetune_packed_sinks_"  # followed by the kernel's name


class PackedAttention(GptOssAttention):
    """Attention over packed sequences with learned sinks: projections, rotary positions, one of our kernels.

    Attributes:
        fused_rotary: turn queries and keys by the Triton kernel (see `select_attention_kernel`).
    """

    fused_rotary = False

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: AttentionPlan | CachedAttention | None,
        **_others: Any,
    ) -> tuple[Tensor, None]:
        """Argument names are transformers'.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: cosines and sines [B, T, d/2] of the rotary angles.
            attention_mask: the layer's plan, or its key-value cache in generation. transformers passes on unchanged
                whatever the caller has given for the layer's type, so packed sequences need no T x T mask.

        Returns:
            [B, T, D] and None.

        Raises:
            ValueError: there is no plan. A plain mask does not separate packed examples (transformers issue 39997), so
                falling back to one would let examples attend to each other.
        """
        if not isinstance(attention_mask, AttentionPlan | CachedAttention):
            raise ValueError("call the model through finetune.model.forward: packed attention needs its plan")
        if self.training and self.attention_dropout:
            raise ValueError("attention dropout is not implemented; gpt-oss publishes 0.0")
        tokens = hidden_states.flatten(0, -2)
        q, k, v = (
            project(tokens).view(len(tokens), -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (angles.flatten(0, -2) for angles in position_embeddings)
        q, k = (rotate(x, cos, sin, fused=self.fused_rotary) for x in (q, k))
        attention = ATTENTION_KERNELS[self.config._attn_implementation.removeprefix(ATTENTION_NAME)]
        sinks = self.sinks.to(q.dtype)
        if isinstance(attention_mask, CachedAttention):
            out = attention_mask(self.layer_idx, q, k, v, sinks, self.scaling, attention)
        else:
            out = attention(q, k, v, sinks, attention_mask, self.scaling)
        return self.o_proj(out.flatten(1)).view(hidden_states.shape), None


class RmsNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, computed in float32 and rounded once.

    Args:
        width: D.
        eps: from config.json.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def replace_layer_parts(layer: GptOssDecoderLayer, config: GptOssConfig, number: int) -> None:
    """Put our attention and norms into a layer, on the current default device and without values."""
    layer.self_attn = PackedAttention(config, number)
    for name in ("input_layernorm", "post_attention_layernorm"):
        setattr(layer, name, RmsNorm(config.hidden_size, config.rms_norm_eps))


def replace_model_parts(model: GptOssForCausalLM) -> None:
    """`replace_layer_parts` in every layer, and the final norm."""
    for number, layer in enumerate(model.model.layers):
        replace_layer_parts(layer, model.config, number)
    model.model.norm = RmsNorm(model.config.hidden_size, model.config.rms_norm_eps)


def _not_called(*_: Any, **__: Any) -> tuple[Tensor, None]:
    raise ValueError("attention is computed by PackedAttention; the model was built without it")


def register_attention(kernel: str = "reference") -> str:
    """Make a kernel's name known to transformers, which refuses unknown ones, and return it as the config has it.

    Only the name counts: `PackedAttention` looks the kernel up and never asks transformers for it.

    Args:
        kernel: a key of `finetune.kernels.choice.ATTENTION_KERNELS`.
    """
    name = ATTENTION_NAME + kernel
    AttentionInterface.register(name, _not_called)
    return name


def select_attention_kernel(model: GptOssForCausalLM, wanted: AttentionKernel) -> KernelChoice:
    """Choose the attention kernel of a loaded base and use it from now on (a base is built with the reference).

    Args:
        model: on its device, in its compute dtype.
        wanted: the recipe's `model.attention_kernel`.

    Raises:
        MachineError: the recipe demands a kernel that cannot be used here.
    """
    config, weight = model.config, model.model.norm.weight
    dims = AttentionDims(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.sliding_window)
    choice = choose_attention_kernel(wanted, dims, weight.device, weight.dtype)
    config._attn_implementation = register_attention(choice.kernel)
    if weight.device.type != "cuda":
        return choice
    obstacle = rotary_obstacle(weight.device, weight.dtype) if wanted != "reference" else "the reference was asked for"
    for layer in model.model.layers:
        layer.self_attn.fused_rotary = obstacle is None
    by = "Triton" if obstacle is None else f"torch, slower, because {obstacle}"
    return replace(choice, reason=f"{choice.reason}; rotary positions by {by}")


def attention_kernel(model: GptOssForCausalLM) -> str:
    """The attention kernel in use, a key of `finetune.kernels.choice.ATTENTION_KERNELS`."""
    return str(model.config._attn_implementation).removeprefix(ATTENTION_NAME)
