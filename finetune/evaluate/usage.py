"""Where tokens go: counts of what the routers choose on given samples, in groups of tokens.

Shape legend: G groups, M layers, E experts, K active experts a token, N tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune import log
from finetune.data.batches import PADDING_SEGMENT, collate
from finetune.data.harmony.encode import HEADER, Channel
from finetune.data.harmony.render import Example
from finetune.data.packing import pack
from finetune.model.build import Base
from finetune.model.forward import Routing, hidden_states, record_router

GroupsOf = Callable[[int], NDArray[np.int64]]
"""Number of a sample -> the group of each of its tokens, int64 [tokens]."""


class UsageCounter:
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
class UsageCounts:
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
def count_usage(
    base: Base,
    samples: Sequence[Example],
    row_tokens: int,
    groups_of: GroupsOf,
    num_groups: int,
    *,
    task: str,
    between_batches: Callable[[], None] = lambda: None,
) -> UsageCounts:
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
    shape = base.checkpoint.arch
    counter = UsageCounter(shape.num_layers, shape.num_experts, num_groups, base.device)
    choices = []
    rows = pack([len(sample.ids) for sample in samples], row_tokens, np.random.default_rng(0))
    with log.Progress(task, len(samples), "samples") as progress:
        for row in rows:
            between_batches()
            batch = collate([[samples[number] for number in row]])
            with record_router(base.model) as tape:
                hidden_states(base.model, batch.input_ids, batch.positions, batch.segments)
            real = (batch.segments[0] != PADDING_SEGMENT).nonzero()[:, 0].to(base.device)
            groups = torch.from_numpy(np.concatenate([groups_of(number) for number in row])).to(base.device)
            counter.add(tape.layers, real, groups)
            ids = torch.stack([routing.expert_ids[real] for routing in tape.layers])
            choices.append(ids.sort(-1).values.to(torch.int16).cpu().numpy())
            progress.advance(len(row))
    chosen, gates = (counts.transpose(0, 1).cpu().numpy() for counts in (counter.chosen, counter.gates))
    return UsageCounts(counter.tokens.cpu().numpy(), chosen, gates, np.concatenate(choices, axis=1))


def changed_share(one: UsageCounts, other: UsageCounts) -> list[float]:
    """Share of tokens, by layer, whose set of experts is not the same in two measurements of the same samples."""
    return [float(share) for share in (one.choices != other.choices).any(-1).mean(-1)]


def spread(samples: Sequence[Example], count: int) -> tuple[Example, ...]:
    """Up to `count` samples, evenly spread over all."""
    count = min(count, len(samples))
    return tuple(samples[number * len(samples) // count] for number in range(count))


# What counts of routing say: use of experts as tables and figures.
#
# Shape legend: G groups, M layers, E experts, K active experts a token.

HOT = 3.0  # an expert chosen so many times as often as even use would have it


@dataclass(frozen=True)
class Group:
    """Tokens that are counted together: of one source and one channel."""

    source: str
    channel: str


@dataclass(frozen=True)
class UsageFigures:
    """Use of experts in each layer; lists go by layer.

    Attributes:
        entropy: of the shares of the choices, as a share of the most there can be: 1 is even use.
        variation: their standard deviation over their mean: 0 is even use.
        dead: experts that no token chose.
        hot: experts chosen `HOT` times as often as even use would have it, or oftener.
    """

    entropy: list[float]
    variation: list[float]
    dead: list[list[int]]
    hot: list[list[int]]


def usage_figures(chosen: NDArray[np.float64]) -> UsageFigures:
    """Figures of counts [M, E], each layer's with at least one choice."""
    num_experts = chosen.shape[1]
    share = chosen / chosen.sum(1, keepdims=True)
    logs = np.log(np.where(share > 0, share, 1.0))
    entropy = -(share * logs).sum(1) / np.log(num_experts)
    return UsageFigures(
        entropy.tolist(),
        (share.std(1) / share.mean(1)).tolist(),
        [np.flatnonzero(row == 0).tolist() for row in share],
        [np.flatnonzero(row * num_experts >= HOT).tolist() for row in share],
    )


def token_groups(sample: Example, source: int) -> NDArray[np.int64]:
    """The group of each token of a sample: its number in `group_names`."""
    channels = sample.channels if len(sample.channels) else np.zeros(len(sample.ids), dtype=np.int8)
    return source * len(Channel) + (channels % HEADER).astype(np.int64)


def group_names(sources: Sequence[str]) -> list[Group]:
    """All groups of some sources, in the order that `token_groups` numbers them."""
    return [Group(source, channel.name.lower()) for source in sources for channel in Channel]


def usage_table(when: str, counts: UsageCounts, groups: Sequence[Group]) -> pa.Table:
    """One row for each group with tokens, layer and expert.

    Columns: `when`, `source`, `channel`, `layer`, `expert`; `tokens` of the group, `chosen`, how many of them went
    through the expert, `gate`, the sum of the weights with which they did; `token_share` and `gate_share`, both over
    `tokens`. A layer's token shares add up to K, its gate shares to 1.
    """
    kept = np.flatnonzero(counts.tokens).tolist()
    chosen, gates = counts.chosen[kept], counts.gates[kept]
    shape = chosen.shape
    group, layer, expert = (index.reshape(-1) for index in np.indices(shape))
    tokens = np.broadcast_to(counts.tokens[kept][:, None, None], shape).reshape(-1)
    return pa.table(
        {
            "when": pa.array([when]).take(pa.array(np.zeros(len(group), dtype=np.int64))),
            "source": pa.array([groups[number].source for number in kept]).take(pa.array(group)),
            "channel": pa.array([groups[number].channel for number in kept]).take(pa.array(group)),
            "layer": layer.astype(np.int16),
            "expert": expert.astype(np.int16),
            "tokens": tokens.astype(np.int64),
            "chosen": chosen.reshape(-1).astype(np.int64),
            "gate": gates.reshape(-1),
            "token_share": chosen.reshape(-1) / tokens,
            "gate_share": gates.reshape(-1) / tokens,
        }
    )


def write_usage(path: Path, tables: Sequence[pa.Table]) -> None:
    """Write tables of `usage_table` into one Parquet file, in one step."""
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.concat_tables(tables), partial)
    os.replace(partial, path)


def heat_pixels(chosen: NDArray[np.float64], pixels: int = 8) -> NDArray[np.uint8]:
    """Use of experts as a grey image [M·pixels, E·pixels] for trackers: white is unused, black `HOT` and more."""
    relative = chosen / chosen.sum(1, keepdims=True) * chosen.shape[1]
    grey = (255 * (1 - np.clip(relative / HOT, 0, 1))).astype(np.uint8)
    return np.kron(grey, np.ones((pixels, pixels), dtype=np.uint8))
