"""Use of experts as figures, tables and images, from counts of router choices.

Shape legend: G groups, M layers, E experts, K active experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune.data.harmony.encode import HEADER, Channel
from finetune.data.harmony.render import Example
from finetune.files import replaced_file
from finetune.model.usage import UsageCounts

HOT = 3.0
"""Multiple of even use from which an expert counts as hot."""


@dataclass(frozen=True)
class Group:
    """Tokens that are counted together: of one source and one channel."""

    source: str
    channel: str


@dataclass(frozen=True)
class UsageFigures:
    """Use of experts, layer by layer.

    Attributes:
        entropy: of the shares of the choices, divided by its maximum: 1 is even use.
        variation: standard deviation over mean of the shares: 0 is even use.
        dead: experts that no token chose.
        hot: experts chosen at least `HOT` times as often as under even use.
    """

    entropy: list[float]
    variation: list[float]
    dead: list[list[int]]
    hot: list[list[int]]


def usage_figures(chosen: NDArray[np.float64]) -> UsageFigures:
    """Figures of choices [M, E] counted in each layer; every layer has at least one choice."""
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


def token_groups(example: Example, source: int) -> NDArray[np.int64]:
    """int64 [tokens]: the group of each token of an example, as numbered by `group_names`."""
    channels = example.channels if len(example.channels) else np.zeros(len(example.ids), dtype=np.int8)
    return source * len(Channel) + (channels % HEADER).astype(np.int64)


def group_names(sources: Sequence[str]) -> list[Group]:
    """All groups of some sources, in the order in which `token_groups` numbers them."""
    return [Group(source, channel.name.lower()) for source in sources for channel in Channel]


def usage_table(when: str, counts: UsageCounts, groups: Sequence[Group]) -> pa.Table:
    """A table with one row per group (of those with tokens), layer and expert.

    Columns: `when`, `source`, `channel`, `layer`, `expert`; `tokens` of the group; `chosen`, how many of them were
    routed to the expert; `gate`, the sum of their weights; `token_share` and `gate_share`, both divided by `tokens`. A
    layer's token shares add up to K, its gate shares to 1.
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
    """Write tables of `usage_table` into one Parquet file, replacing it in one step."""
    with replaced_file(path) as partial:
        pq.write_table(pa.concat_tables(tables), partial)


def heat_pixels(chosen: NDArray[np.float64], pixels: int = 8) -> NDArray[np.uint8]:
    """Use of experts as a grey image [M·pixels, E·pixels] for trackers: white is unused, black `HOT` times even use."""
    relative = chosen / chosen.sum(1, keepdims=True) * chosen.shape[1]
    grey = (255 * (1 - np.clip(relative / HOT, 0, 1))).astype(np.uint8)
    return np.kron(grey, np.ones((pixels, pixels), dtype=np.uint8))
