"""The section of report.md on experts: heat maps of their use before and after training, and figures by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune.files import write_text
from finetune.report.charts import heat_map
from finetune.results import Json

USAGE_FILE = "expert_usage.parquet"
FIGURES = "figures"
MOST = 3.0
"""Times even use at which a heat map is darkest."""
FEWEST_TOKENS = 100
"""A channel or source with fewer tokens gets no map of its own."""


def experts_section(run: Path, manifest: Json) -> str:
    """Write the heat maps into the run directory and return the section; empty where nothing was measured."""
    routing = manifest.get("routing")
    if not routing:
        return ""
    try:
        table = pq.read_table(run / USAGE_FILE)
    except (OSError, pa.ArrowInvalid):
        return ""
    maps = _maps(table)
    lines = []
    for name, (title, values, diverging) in maps.items():
        drawn = heat_map(values.tolist(), title=title, rows="layer", columns="expert", most=MOST, diverging=diverging)
        write_text(run / FIGURES / f"{name}.svg", drawn)
        lines.append(f"![{name.replace('_', ' ')}]({FIGURES}/{name}.svg)")
    note = (
        f"Measured on {routing['samples']} {routing['split']} examples; 1 is even use of a layer's experts. Every "
        f"number is in `{USAGE_FILE}`, by channel and source."
    )
    return "\n\n".join(["## Experts", note, *lines, _by_layer(routing)])


def _maps(table: pa.Table) -> dict[str, tuple[str, NDArray[np.float64], bool]]:
    """By file name: title, values relative to even use [layers, experts], and whether they have a sign."""
    rows = {column: table[column].to_numpy(zero_copy_only=False) for column in table.column_names}
    when = rows["when"]
    before, after = _relative(rows, when == "before"), _relative(rows, when == "after")
    maps = {
        "experts_before": ("use of experts before training", before, False),
        "experts_after": ("use of experts after training", after, False),
        "experts_change": ("change in the use of experts", after - before, True),
    }
    for column in ("channel", "source"):
        names = list(dict.fromkeys(rows[column][when == "after"]))
        if len(names) < 2:
            continue
        for number, name in enumerate(names):
            mask = (when == "after") & (rows[column] == name)
            tokens = rows["chosen"][mask & (rows["layer"] == 0)].sum()
            if tokens >= FEWEST_TOKENS:
                title = f"use of experts after training, {column} {name}"
                maps[f"experts_{column}_{number}"] = (title, _relative(rows, mask), False)
    return maps


def _relative(rows: dict[str, NDArray[Any]], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Use of each expert as a multiple of even use: [layers, experts]."""
    layers, experts = rows["layer"][mask], rows["expert"][mask]
    chosen = np.zeros((rows["layer"].max() + 1, rows["expert"].max() + 1))
    np.add.at(chosen, (layers, experts), rows["chosen"][mask])
    return chosen / np.maximum(chosen.sum(1, keepdims=True), 1) * chosen.shape[1]


def _by_layer(routing: Json) -> str:
    before, after = routing["before"], routing["after"]
    table = [
        "| layer | entropy | variation | dead | hot | tokens with other experts |",
        "|---|---|---|---|---|---|",
    ]
    for layer, drift in enumerate(routing["drift"]):
        pair = [f"{before[key][layer]:.3f} → {after[key][layer]:.3f}" for key in ("entropy", "variation")] + [
            f"{len(before[key][layer])} → {len(after[key][layer])}" for key in ("dead", "hot")
        ]
        table.append(f"| {layer} | " + " | ".join(pair) + f" | {drift:.1%} |")
    return (
        "\n".join(table) + "\n\nEntropy is a share of the most there can be, variation is the standard deviation over "
        "the mean; a hot expert is chosen 3 times as often as even use would have it."
    )
