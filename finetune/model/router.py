"""Seeing the router at work: logits and choices of every layer during one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import GptOssForCausalLM


@dataclass(frozen=True)
class Routing:
    """One layer's routing: `logits` [T, E] and `gates` [T, K] with gradient, `expert_ids` int64 [T, K]."""

    logits: Tensor
    expert_ids: Tensor
    gates: Tensor


@dataclass
class RoutingTape:
    """Routing of each layer, in order, as the forward pass met it."""

    layers: list[Routing] = field(default_factory=list)


@contextmanager
def record_routing(model: GptOssForCausalLM) -> Iterator[RoutingTape]:
    """Record every layer's routing of the forward passes inside the `with` block.

    The hooks are gone when the block ends, so a layer that activation checkpointing runs a second time, in the
    backward pass, is not recorded twice. With non-reentrant checkpointing the recorded logits are part of the graph.
    """
    tape = RoutingTape()

    def remember(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        router_logits, gates, expert_ids = output
        tape.layers.append(Routing(router_logits, expert_ids, gates))

    handles = [layer.mlp.router.register_forward_hook(remember) for layer in model.model.layers]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()
