"""Attention with sinks over packed sequences inside transformers' gpt-oss, by its public registry of functions."""

from __future__ import annotations

from torch import Tensor
from transformers import AttentionInterface, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from finetune.kernels.attention import AttentionPlan
from finetune.kernels.cache import CachedAttention
from finetune.kernels.choice import (
    ATTENTION_KERNELS,
    AttentionDims,
    AttentionKernel,
    KernelChoice,
    choose_attention_kernel,
)

ATTENTION_NAME = "finetune_packed_sinks_"  # followed by the kernel's name


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
    """Attention with the signature that transformers calls.

    Args:
        module: the layer's attention module.
        query: [B, H, T, d].
        key, value: [B, J, T, d].
        attention_mask: the layer's plan, or its key-value cache in generation. transformers passes on unchanged
            whatever the caller has given for the layer's type, so packed sequences need no T x T mask.
        scaling: factor on the scores.
        s_aux: [H], sink logits.

    Returns:
        [B, T, H, d] and None.

    Raises:
        ValueError: there is no plan. A plain mask does not separate packed examples (transformers issue 39997), so
            falling back to one would let examples attend to each other.
    """
    if not isinstance(attention_mask, AttentionPlan | CachedAttention):
        raise ValueError("call the model through finetune.model.forward: packed attention needs its plan")
    if dropout:
        raise ValueError("attention dropout is not implemented; gpt-oss publishes 0.0")
    batch, length = query.shape[0], query.shape[2]

    def joined(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch * length, x.shape[1], x.shape[3])

    q, k, v, sinks = joined(query), joined(key), joined(value), s_aux.to(query.dtype)
    attention = ATTENTION_KERNELS[module.config._attn_implementation.removeprefix(ATTENTION_NAME)]
    if isinstance(attention_mask, CachedAttention):
        out = attention_mask(module.layer_idx, q, k, v, sinks, scaling, attention)
    else:
        out = attention(q, k, v, sinks, attention_mask, scaling)
    return out.view(batch, length, *out.shape[1:]), None


def register_attention(kernel: str = "reference") -> str:
    """Register the function with transformers and return its name there. Registering again changes nothing.

    Args:
        kernel: a key of `finetune.kernels.choice.ATTENTION_KERNELS`.
    """
    name = ATTENTION_NAME + kernel
    AttentionInterface.register(name, packed_sink_attention)
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
    return choice


def attention_kernel(model: GptOssForCausalLM) -> str:
    """The attention kernel in use, a key of `finetune.kernels.choice.ATTENTION_KERNELS`."""
    return str(model.config._attn_implementation).removeprefix(ATTENTION_NAME)
