"""What counts of routing say: use of experts as tables and figures.

Shape legend: G groups, M layers, E experts, K active experts a token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune.data.channels import HEADER, Channel
from finetune.data.render import Sample
from finetune.evaluate.routing import RoutingCounts

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


def token_groups(sample: Sample, source: int) -> NDArray[np.int64]:
    """The group of each token of a sample: its number in `group_names`."""
    channels = sample.channels if len(sample.channels) else np.zeros(len(sample.ids), dtype=np.int8)
    return source * len(Channel) + (channels % HEADER).astype(np.int64)


def group_names(sources: Sequence[str]) -> list[Group]:
    """All groups of some sources, in the order that `token_groups` numbers them."""
    return [Group(source, channel.name.lower()) for source in sources for channel in Channel]


def usage_table(when: str, counts: RoutingCounts, groups: Sequence[Group]) -> pa.Table:
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
