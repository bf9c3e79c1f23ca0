"""The forward pass over packed sequences: final hidden states, router outputs, and the positions that predict labels.

Calling transformers' `forward` with a plain mask would let packed examples attend to each other; `hidden_states` always
makes the attention plans of both kinds of layer from the batch's own segments, and `check_packing` proves on the live
model that examples are separate.

Shape legend: B sequences, T tokens of a sequence, D hidden, V vocabulary, E experts, K active experts per token.
"""

from __future__ import annotations

import math
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

# Largest leakage that passes, as a share of that of two examples joined on purpose. On a CPU float32 gives about 3e-7
# and bfloat16 exactly 0. On a GPU tokens of the two sequences share products with other tokens of their expert, so in
# bfloat16 one may take another expert; no GPU has measured that on the large models yet, hence the wide margin.
LARGEST_LEAKAGE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
NUM_PLAIN_TOKENS = 199_998  # the BPE ranks; ids above are control tokens


def hidden_states(
    model: GptOssForCausalLM,
    input_ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    prefixes: Tensor | None = None,
) -> Tensor:
    """Final normed hidden states of packed sequences.

    Args:
        model: a loaded base (see `finetune.model.open`), with or without an adapter.
        input_ids: int64 [B, T].
        positions: int64 [B, T], restarting with every example.
        segments: int64 [B, T], number of the example within the sequence, -1 on padding.
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


def shift_labels(input_ids: Tensor, weights: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that predict a trained token, the tokens, and their weights.

    Args:
        input_ids: int64 [B, T].
        weights: float32 [B, T]: loss weight of each token, predicted from the tokens before it; 0 is context.
        segments: int64 [B, T], number of the example within the sequence, -1 on padding.

    Returns:
        Positions int64 [N] in the flattened [B·T] hidden states, labels int64 [N], and their weights float32 [N].

    Raises:
        ValueError: an example's first token has a loss weight, though no token of the example comes before it.
    """
    same_example = segments[:, 1:] == segments[:, :-1]
    next_weights = weights[:, 1:]
    if (next_weights * ~same_example).any() or weights[:, 0].any():
        raise ValueError("the first token of an example has a loss weight; there is nothing to predict it from")
    flat = F.pad(next_weights, (0, 1)).reshape(-1)
    positions = flat.nonzero()[:, 0]
    labels = F.pad(input_ids[:, 1:], (0, 1)).reshape(-1)[positions]
    return positions, labels, flat[positions]


def checkpoint_activations(model: GptOssForCausalLM) -> None:
    """Recompute each layer in the backward pass instead of saving its activations (in training mode only).

    Non-reentrant, or the router logits would be cut off from the graph and a balance loss on them would train nothing.
    The expert block replays itself, so a layer that is recomputed skips it (`checkpoint_contexts`).
    """
    options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    if hasattr(model, "activation_checkpointing_enable"):  # the older name is deprecated since transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


# Router outputs


@dataclass(frozen=True)
class RouterOutput:
    """One layer's router output.

    Attributes:
        logits: [T, E], with gradient.
        expert_ids: int64 [T, K].
        gates: [T, K], weights of the chosen experts, with gradient.
    """

    logits: Tensor
    expert_ids: Tensor
    gates: Tensor


@dataclass
class RouterTape:
    """Router outputs of the layers, in the order of the forward pass."""

    layers: list[RouterOutput] = field(default_factory=list)


@contextmanager
def record_router(model: GptOssForCausalLM) -> Iterator[RouterTape]:
    """Record every layer's router output of the forward passes inside the `with` block.

    The hooks are removed at the end of the block, so a layer that activation checkpointing recomputes in the backward
    pass is not recorded twice. With non-reentrant checkpointing the recorded logits are part of the graph.
    """
    tape = RouterTape()

    def remember(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        router_logits, gates, expert_ids = output
        tape.layers.append(RouterOutput(router_logits, expert_ids, gates))

    handles = [layer.mlp.router.register_forward_hook(remember) for layer in model.model.layers]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


# The packing check at start-up


@torch.no_grad()
def packing_leakage(model: GptOssForCausalLM, *, seed: int = 0, join: bool = False) -> float:
    """Change of an example's hidden states when the example before it in the sequence is replaced by another.

    transformers' gpt-oss never passes position ids to its mask builder (transformers issue 39997), so packing with its
    own masks lets a second document attend to the first: logits then differ by 3.67 where their standard deviation is
    0.84. Our plans avoid this; the check proves it on the very model, device and dtype of the run, in both kinds of
    layer. Both sequences have the same shape, so that a device runs the same kernels on both and rounding does not look
    like a leak.

    Args:
        model: a loaded base.
        seed: of the random tokens.
        join: make one segment of the two examples, to measure what a real leak gives.

    Returns:
        Root-mean-square difference relative to the hidden states' own root mean square.
    """
    length = model.config.sliding_window + 40  # long enough that the window cuts something off
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(NUM_PLAIN_TOKENS, (3, length), generator=generator) % model.config.vocab_size
    positions = torch.arange(length).repeat(2)[None]
    segments = torch.zeros(2 * length, dtype=torch.long) if join else torch.arange(2).repeat_interleave(length)
    one, other = (
        hidden_states(model, torch.cat([neighbour, ids[2]])[None], positions, segments[None])[0, length:].float()
        for neighbour in ids[:2]
    )
    return ((one - other).square().mean().sqrt() / one.square().mean().sqrt()).item()


def check_packing(model: GptOssForCausalLM) -> float:
    """Compare the leakage between packed examples with that of two examples joined on purpose.

    Returns:
        The leakage as a share of the latter.

    Raises:
        CheckError: packed examples are not separate.
    """
    was_training = model.training
    model.eval()
    share = packing_leakage(model) / packing_leakage(model, join=True)
    model.train(was_training)
    if not math.isfinite(share):
        raise CheckError(
            "the base's hidden states are not finite",
            why="its weights or config.json are damaged, or its values overflow in this dtype",
            fix="download or copy the checkpoint again, or set model.compute_dtype to another one",
        )
    if not share < LARGEST_LEAKAGE[model.lm_head.weight.dtype]:
        raise CheckError(
            f"packed examples are not separate: cross-example leakage is {share:.2g} of that of unmasked examples",
            why="training on this would teach the model to attend across unrelated documents",
            fix="set data.pack=false to train without packing, and report your torch and transformers versions",
        )
    return share
