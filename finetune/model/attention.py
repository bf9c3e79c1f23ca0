"""Our attention inside transformers' gpt-oss, through its public registry of attention functions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from transformers import AttentionInterface, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from finetune.kernels.attention import AttentionPlan
from finetune.kernels.attention_choice import KERNELS, AttentionChoice, AttentionDims, choose_attention
from finetune.kernels.cache import CachedAttention

ATTENTION_NAME = "finetune_packed_sinks_"  # with the kernel's name behind it


def packed_sink_attention(
    module: GptOssAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionPlan | CachedAttention | None,
    *,
    scaling: float,
    s_aux: Tensor,
    dropout: float = 0.0,
    **_others: object,
) -> tuple[Tensor, None]:
    """The signature transformers calls: query [B, H, T, d], key and value [B, J, T, d] -> ([B, T, H, d], None).

    Args:
        attention_mask: the layer's plan, or what generation has in its place. transformers hands whatever the caller
            put under this layer's type through untouched, which is how packed rows reach us without a T x T mask.

    Raises:
        ValueError: without a plan. Plain masks know nothing of packed samples (transformers issue 39997), so falling
            back to one would let samples see each other.
    """
    if not isinstance(attention_mask, AttentionPlan | CachedAttention):
        raise ValueError("call the model through finetune.model.forward: packed attention needs its plan")
    if dropout:
        raise ValueError("attention dropout is not implemented; gpt-oss publishes 0.0")
    batch, length = query.shape[0], query.shape[2]

    def joined(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch * length, x.shape[1], x.shape[3])

    q, k, v, sinks = joined(query), joined(key), joined(value), s_aux.to(query.dtype)
    attention = KERNELS[module.config._attn_implementation.removeprefix(ATTENTION_NAME)]
    if isinstance(attention_mask, CachedAttention):
        out = attention_mask(module.layer_idx, q, k, v, sinks, scaling, attention)
    else:
        out = attention(q, k, v, sinks, attention_mask, scaling)
    return out.view(batch, length, *out.shape[1:]), None


def register_attention(kernel: str = "reference") -> str:
    """Make the function known to transformers and return the name to ask for. Calling it again changes nothing.

    Args:
        kernel: a key of `finetune.kernels.attention_choice.KERNELS`.
    """
    name = ATTENTION_NAME + kernel
    AttentionInterface.register(name, packed_sink_attention)
    return name


def select_attention(model: GptOssForCausalLM, wanted: Literal["auto", "flash", "reference"]) -> AttentionChoice:
    """Choose the kernel for a loaded base and use it from now on (a base is loaded with the reference).

    Args:
        model: on its device, in its compute dtype.
        wanted: the recipe's `model.attention_kernel`.

    Returns:
        What was chosen and why, to be said to the person.

    Raises:
        MachineError: the recipe demands a kernel that cannot be used here.
    """
    config, weight = model.config, model.model.norm.weight
    shape = AttentionDims(
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.sliding_window
    )
    choice = choose_attention(wanted, shape, weight.device, weight.dtype)
    config._attn_implementation = register_attention(choice.kernel)
    return choice


def attention_kernel(model: GptOssForCausalLM) -> str:
    """The kernel in use, a key of `finetune.kernels.attention_choice.KERNELS`."""
    return str(model.config._attn_implementation).removeprefix(ATTENTION_NAME)
