"""Counts of the experts that the routers choose, per group of tokens.

Shape legend: G groups, M layers, E experts, K active experts per token, N tokens.
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
from finetune.data.harmony.render import Example
from finetune.data.packing import pack
from finetune.model.build import Base
from finetune.model.forward import RouterOutput, hidden_states, record_router

GroupsOf = Callable[[int], NDArray[np.int64]]
"""Number of an example -> the group of each of its tokens, int64 [tokens]."""


class UsageCounter:
    """Counts router choices on the device, without synchronising with the host.

    Args:
        num_layers, num_experts: M and E.
        num_groups: G.
        device: of the router outputs.
    """

    def __init__(self, num_layers: int, num_experts: int, num_groups: int, device: torch.device) -> None:
        shape = (num_layers, num_groups, num_experts)
        self.chosen = torch.zeros(shape, dtype=torch.float64, device=device)
        self.gates = torch.zeros(shape, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(num_groups, dtype=torch.float64, device=device)

    def add(self, layers: Sequence[RouterOutput], tokens: Tensor, groups: Tensor | None = None) -> None:
        """Count some tokens.

        Args:
            layers: router output of each layer.
            tokens: int64 [N], which tokens.
            groups: int64 [N], the group of each; None: all belong to the first.
        """
        num_layers, _, num_experts = self.chosen.shape
        ids = torch.stack([routing.expert_ids[tokens] for routing in layers])
        gates = torch.stack([routing.gates.detach()[tokens] for routing in layers]).double()
        if groups is None:
            self.tokens[0] += len(tokens)
        else:
            self.tokens.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
            ids = ids + groups[:, None] * num_experts
        flat = ids.reshape(num_layers, -1)
        self.chosen.view(num_layers, -1).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
        self.gates.view(num_layers, -1).scatter_add_(1, flat, gates.reshape(num_layers, -1))


@dataclass(frozen=True, eq=False)
class UsageCounts:
    """Router choices on some examples.

    Attributes:
        tokens: float64 [G].
        chosen: float64 [G, M, E], how many of them were routed to each expert.
        gates: float64 [G, M, E], the sum of their weights.
        choices: int16 [M, N, K], each token's experts in ascending order; tokens always come in the same order.
    """

    tokens: NDArray[np.float64]
    chosen: NDArray[np.float64]
    gates: NDArray[np.float64]
    choices: NDArray[np.int16]


@torch.no_grad()
def count_usage(
    base: Base,
    examples: Sequence[Example],
    row_tokens: int,
    groups_of: GroupsOf,
    num_groups: int,
    *,
    task: str,
    between_batches: Callable[[], None] = lambda: None,
) -> UsageCounts:
    """Run examples through the model as it is, and count.

    Args:
        base: with the adapter on or off.
        examples: at least one.
        row_tokens: tokens in a packed sequence, at least the longest example.
        groups_of: see `GroupsOf`.
        num_groups: G.
        task: title of the progress line.
        between_batches: called between two forward passes; raises to stop early.
    """
    base.model.eval()
    arch = base.checkpoint.arch
    counter = UsageCounter(arch.num_layers, arch.num_experts, num_groups, base.device)
    choices = []
    sequences = pack([len(example.ids) for example in examples], row_tokens, np.random.default_rng(0))
    with log.Progress(task, len(examples), "examples") as progress:
        for sequence in sequences:
            between_batches()
            batch = collate([[examples[number] for number in sequence]])
            with record_router(base.model) as tape:
                hidden_states(base.model, batch.input_ids, batch.positions, batch.segments)
            real = (batch.segments[0] != PADDING_SEGMENT).nonzero()[:, 0].to(base.device)
            groups = torch.from_numpy(np.concatenate([groups_of(number) for number in sequence])).to(base.device)
            counter.add(tape.layers, real, groups)
            ids = torch.stack([routing.expert_ids[real] for routing in tape.layers])
            choices.append(ids.sort(-1).values.to(torch.int16).cpu().numpy())
            progress.advance(len(sequence))
    chosen, gates = (counts.transpose(0, 1).cpu().numpy() for counts in (counter.chosen, counter.gates))
    return UsageCounts(counter.tokens.cpu().numpy(), chosen, gates, np.concatenate(choices, axis=1))


def changed_share(one: UsageCounts, other: UsageCounts) -> list[float]:
    """By layer, the share of tokens whose set of experts differs between two measurements of the same examples."""
    return [float(share) for share in (one.choices != other.choices).any(-1).mean(-1)]
