"""The one way through the model: packed rows in, final hidden states out.

Calling transformers' `forward` with a plain mask would let packed samples see each other; here the attention plans of
both kinds of layer are always made from the batch's own segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GptOssForCausalLM

from finetune.errors import CheckError
from finetune.kernels.attention import plan_attention
from finetune.kernels.dispatch import checkpoint_contexts


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


# Which positions of a batch predict a trained token: the shift by one, done in one place.


def shift_labels(input_ids: Tensor, weights: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that predict a trained token, the token, and its weight.

    Args:
        input_ids: int64 [B, S].
        weights: float32 [B, S]: weight of predicting this token from what stands before it; 0 is context.
        segments: int64 [B, S], sample number in the row, -1 on padding.

    Returns:
        `where` int64 [N] into the flattened [B·S] hidden states, `targets` int64 [N], `target_weights` float32 [N].

    Raises:
        ValueError: a sample's first token is trained, though nothing of the sample stands before it.
    """
    same_sample = segments[:, 1:] == segments[:, :-1]
    next_weights = weights[:, 1:]
    if (next_weights * ~same_sample).any() or weights[:, 0].any():
        raise ValueError("the first token of a sample has a loss weight; there is nothing to predict it from")
    flat = F.pad(next_weights, (0, 1)).reshape(-1)
    where = flat.nonzero()[:, 0]
    targets = F.pad(input_ids[:, 1:], (0, 1)).reshape(-1)[where]
    return where, targets, flat[where]


# Seeing the router at work: logits and choices of every layer during one forward pass.


@dataclass(frozen=True)
class Routing:
    """One layer's routing: `logits` [T, E] and `gates` [T, K] with gradient, `expert_ids` int64 [T, K]."""

    logits: Tensor
    expert_ids: Tensor
    gates: Tensor


@dataclass
class RouterTape:
    """Routing of each layer, in order, as the forward pass met it."""

    layers: list[Routing] = field(default_factory=list)


@contextmanager
def record_router(model: GptOssForCausalLM) -> Iterator[RouterTape]:
    """Record every layer's routing of the forward passes inside the `with` block.

    The hooks are gone when the block ends, so a layer that activation checkpointing runs a second time, in the
    backward pass, is not recorded twice. With non-reentrant checkpointing the recorded logits are part of the graph.
    """
    tape = RouterTape()

    def remember(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        router_logits, gates, expert_ids = output
        tape.layers.append(Routing(router_logits, expert_ids, gates))

    handles = [layer.mlp.router.register_forward_hook(remember) for layer in model.model.layers]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


# A check on the live model at start-up: does one packed sample see another?
#
# transformers' gpt-oss never passes position ids to its mask builder (transformers issue 39997), so packing with its
# own masks lets a second document read the first: logits then differ by 3.67 where their standard deviation is 0.84.
# Ours go around that; this proves it on the very model, device and dtype of the run, in both kinds of layer.

# Share of what a real leak gives on this very model. Rounding gives about 1e-6 of it in float32; in bfloat16 a token
# now and then takes another expert, which no GPU has measured on the large models yet, hence the wide margin.
LARGEST_SHARE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
NUM_PLAIN_TOKENS = 199_998  # the BPE ranks; ids above are control tokens


@torch.no_grad()
def packing_leak(model: GptOssForCausalLM, *, seed: int = 0, leak: bool = False) -> float:
    """How much a sample's hidden states change when another sample stands before it in the row.

    Args:
        model: a loaded base.
        seed: seed of the random tokens.
        leak: join the two samples on purpose, to see what this measure gives then.

    Returns:
        Root-mean-square difference relative to the hidden states' own root mean square.
    """
    length = model.config.sliding_window + 40  # long enough that the window cuts something off
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(NUM_PLAIN_TOKENS, (2, length), generator=generator) % model.config.vocab_size
    positions = torch.arange(length)
    alone = hidden_states(model, ids[1:], positions[None], torch.zeros(1, length, dtype=torch.long))[0]
    segments = torch.zeros(2 * length, dtype=torch.long) if leak else torch.arange(2).repeat_interleave(length)
    packed = hidden_states(model, ids.reshape(1, -1), positions.repeat(2)[None], segments[None])[0, length:]
    difference = (packed - alone).float().square().mean().sqrt()
    return (difference / alone.float().square().mean().sqrt()).item()


def check_packing(model: GptOssForCausalLM) -> float:
    """Run the check and return the leak as a share of what joining two samples on purpose gives.

    Raises:
        CheckError: packed samples see each other.
    """
    was_training = model.training
    model.eval()
    share = packing_leak(model) / packing_leak(model, leak=True)
    model.train(was_training)
    if not share < LARGEST_SHARE[model.lm_head.weight.dtype]:
        raise CheckError(
            f"packed samples are not separate: a neighbour changes hidden states by {share:.2g} of what a leak would",
            why="training on this would teach the model to read across unrelated documents",
            fix="set data.pack=false to train without packing, and report your torch and transformers versions",
        )
    return share
