"""Our attention inside transformers' gpt-oss, through its public registry of attention functions."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface

from finetune.kernels.attention import AttentionPlan, sink_attention
from finetune.kernels.cache import CachedAttention

ATTENTION_NAME = "finetune_packed_sinks"


def packed_sink_attention(
    module: nn.Module,
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
    if isinstance(attention_mask, CachedAttention):
        layer: int = module.layer_idx  # type: ignore[assignment]
        out = attention_mask(layer, q, k, v, sinks, scaling)
    else:
        out = sink_attention(q, k, v, sinks, attention_mask, scaling)
    return out.view(batch, length, *out.shape[1:]), None


def register_attention() -> str:
    """Make the function known to transformers and return the name to ask for. Calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, packed_sink_attention)
    return ATTENTION_NAME
