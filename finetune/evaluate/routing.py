"""Where tokens go: counts of what the routers choose on given samples, in groups of tokens.

Shape legend: G groups, M layers, E experts, K active experts a token, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune import log
from finetune.data.batches import PADDING_SEGMENT, collate
from finetune.data.pack import pack
from finetune.data.render import Sample
from finetune.model.build import Base
from finetune.model.forward import hidden_states
from finetune.model.router import Routing, record_routing

GroupsOf = Callable[[int], NDArray[np.int64]]
"""Number of a sample -> the group of each of its tokens, int64 [tokens]."""


class RoutingCounter:
    """Adds up what routers choose, on the device, without waiting for it.

    Args:
        num_layers, num_experts: M and E.
        num_groups: G.
        device: where the routing is.
    """

    def __init__(self, num_layers: int, num_experts: int, num_groups: int, device: torch.device) -> None:
        shape = (num_layers, num_groups, num_experts)
        self.chosen = torch.zeros(shape, dtype=torch.float64, device=device)
        self.gates = torch.zeros(shape, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(num_groups, dtype=torch.float64, device=device)

    def add(self, layers: Sequence[Routing], rows: Tensor, groups: Tensor | None = None) -> None:
        """Count some tokens.

        Args:
            layers: routing of each layer.
            rows: int64 [N], which tokens.
            groups: int64 [N], the group of each; None: all are of the first.
        """
        num_layers, _, num_experts = self.chosen.shape
        ids = torch.stack([routing.expert_ids[rows] for routing in layers])
        gates = torch.stack([routing.gates.detach()[rows] for routing in layers]).double()
        if groups is None:
            self.tokens[0] += len(rows)
        else:
            self.tokens.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
            ids = ids + groups[:, None] * num_experts
        flat = ids.reshape(num_layers, -1)
        self.chosen.view(num_layers, -1).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
        self.gates.view(num_layers, -1).scatter_add_(1, flat, gates.reshape(num_layers, -1))


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """What routers chose on some samples.

    Attributes:
        tokens: float64 [G].
        chosen: float64 [G, M, E], how many of them went through each expert.
        gates: float64 [G, M, E], the sum of the weights with which they did.
        choices: int16 [M, N, K], each token's experts in ascending order; tokens always come in the same order.
    """

    tokens: NDArray[np.float64]
    chosen: NDArray[np.float64]
    gates: NDArray[np.float64]
    choices: NDArray[np.int16]


@torch.no_grad()
def count_routing(
    base: Base,
    samples: Sequence[Sample],
    row_tokens: int,
    groups_of: GroupsOf,
    num_groups: int,
    *,
    task: str,
    between_batches: Callable[[], None] = lambda: None,
) -> RoutingCounts:
    """Run samples through the model as it is, and count.

    Args:
        base: with the adapter on or off.
        samples: at least one.
        row_tokens: tokens in a packed row, at least the longest sample.
        groups_of: see `GroupsOf`.
        num_groups: G.
        task: what the progress line says.
        between_batches: called between two forward passes; raises to leave early.
    """
    base.model.eval()
    shape = base.checkpoint.shape
    counter = RoutingCounter(shape.num_layers, shape.num_experts, num_groups, base.device)
    choices = []
    rows = pack([len(sample.ids) for sample in samples], row_tokens, np.random.default_rng(0))
    with log.Progress(task, len(samples), "samples") as progress:
        for row in rows:
            between_batches()
            batch = collate([[samples[number] for number in row]])
            with record_routing(base.model) as tape:
                hidden_states(base.model, batch.input_ids, batch.positions, batch.segments)
            real = (batch.segments[0] != PADDING_SEGMENT).nonzero()[:, 0].to(base.device)
            groups = torch.from_numpy(np.concatenate([groups_of(number) for number in row])).to(base.device)
            counter.add(tape.layers, real, groups)
            ids = torch.stack([routing.expert_ids[real] for routing in tape.layers])
            choices.append(ids.sort(-1).values.to(torch.int16).cpu().numpy())
            progress.advance(len(row))
    chosen, gates = (counts.transpose(0, 1).cpu().numpy() for counts in (counter.chosen, counter.gates))
    return RoutingCounts(counter.tokens.cpu().numpy(), chosen, gates, np.concatenate(choices, axis=1))


def changed_share(one: RoutingCounts, other: RoutingCounts) -> list[float]:
    """Share of tokens, by layer, whose set of experts is not the same in two measurements of the same samples."""
    return [float(share) for share in (one.choices != other.choices).any(-1).mean(-1)]


def spread(samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
    """Up to `count` samples, evenly spread over all."""
    count = min(count, len(samples))
    return tuple(samples[number * len(samples) // count] for number in range(count))
