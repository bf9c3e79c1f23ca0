"""The one way through the model: packed rows in, final hidden states out.

Calling transformers' `forward` with a plain mask would let packed samples see each other; here the attention plans of
both kinds of layer are always made from the batch's own segments.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune.kernels.attention import plan_attention
from finetune.kernels.routing import checkpoint_contexts


def hidden_states(
    model: GptOssForCausalLM,
    input_ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    prefixes: Tensor | None = None,
) -> Tensor:
    """Final normed hidden states of packed rows.

    Args:
        model: a loaded base (see `finetune.model.build`), with or without an adapter.
        input_ids: int64 [B, T].
        positions: int64 [B, T], restarting with every sample.
        segments: int64 [B, T], sample number within the row, -1 on padding.
        prefixes: int64 [B, T], the segment that each token's segment continues (see `plan_attention`). None: none.

    Returns:
        [B, T, D] in the compute dtype, on the model's device.
    """
    window = model.config.sliding_window
    plans = {
        "full_attention": plan_attention(segments, positions, None, prefixes=prefixes),
        "sliding_attention": plan_attention(segments, positions, window, prefixes=prefixes),
    }
    device = model.lm_head.weight.device
    plans = {kind: plan.to(device) for kind, plan in plans.items()}
    output = model.model(
        input_ids=input_ids.to(model.model.embed_tokens.weight.device),
        position_ids=positions.to(device),
        attention_mask=plans,
        use_cache=False,
    )
    return output.last_hidden_state


def logits(model: GptOssForCausalLM, input_ids: Tensor) -> Tensor:
    """Logits [T, V] of one unpacked sequence of ids int64 [T]; for checks and short prompts."""
    length = len(input_ids)
    positions = torch.arange(length)[None]
    hidden = hidden_states(model, input_ids[None], positions, torch.zeros_like(positions))
    return model.lm_head(hidden[0])


def checkpoint_activations(model: GptOssForCausalLM) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations (in training mode only).

    Non-reentrant, or the router logits would be cut off from the graph and a balance loss on them would train nothing.
    The expert block replays itself, so a layer that is computed again skips it (`checkpoint_contexts`).
    """
    options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    if hasattr(model, "activation_checkpointing_enable"):  # the older name is deprecated since transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
