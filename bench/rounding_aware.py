"""Compare training through the MXFP4 rounding with rounding afterwards: equal steps, experts alone.

`python bench/rounding_aware.py --base DIR --work DIR` compares, at three learning rates and with three seeds:

* after: a plain run of all steps, then compensated rounding (what `finetune export --to mxfp4` does).
* straight through: from the first step the experts in use are rounded in the forward pass, gradients pass as if they
  were not.
* tail: a plain run, compensated rounding, and the rest of the steps straight through from there. The hidden weights
  start in the middle of their cells, or as near to base + update as their codes allow; with biases trained or not.

What is exported is what was trained, so methods are judged by the exported model's loss. `control` trains in this
program's loop without any rounding: it must come near the plain adapter.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from measure import machine, publish
from mxfp4_merge import CPU, SEEDS, SETTINGS, Work
from torch import Tensor, nn

from finetune.adapters.store import AdapterFile
from finetune.config.compose import compose
from finetune.data.batches import Batch, collate
from finetune.data.dataset import load_split
from finetune.data.packing import pack
from finetune.evaluate.likelihood import held_out_loss
from finetune.kernels.experts import clamped_swiglu
from finetune.model.build import build_base
from finetune.model.experts import PUBLISHED_SIGMOID_GAIN, PackedExperts
from finetune.model.forward import hidden_states
from finetune.mxfp4.format import BLOCK
from finetune.objectives.sft import weighted_nll
from finetune.rounding import grid
from finetune.rounding.results import RoundedExperts
from finetune.train.optim import learning_rate

RANK, SCALE = 8, 2.0  # as in the plain runs: alpha 16
PROJECTIONS = ("gate_up_proj", "down_proj")
RATES = {"1 %": 2.7e-4, "10 %": 2.7e-3, "30 %": 8.1e-3}  # by about what a plain run's update comes to
SPLITS = ("validation", "test")
NOTE = (
    "Loss of the exported model on validation and test rows, mean over seeds [least, most]; as many optimiser steps"
    " throughout. `after` is a plain run by `finetune train`, its rows in another order than this loop's, so each is "
    "also held against its own like without rounding: `after` against the adapter, the others against the control."
)


@dataclass(frozen=True)
class Method:
    """A method: its use of the steps.

    Attributes:
        tail: share of the steps that are trained here, after a plain run of the others. 1: all.
        rate: times the recipe's learning rate.
        rounded: whether the forward pass rounds.
        centre: the tail's hidden weights start in the middle of their cells.
        biases: the tail trains the experts' biases too.
    """

    tail: float
    rate: float = 1.0
    rounded: bool = True
    centre: bool = False
    biases: bool = False


CONTROL = "control: this loop, no rounding"
METHODS = {
    CONTROL: Method(1.0, rounded=False),
    "straight through": Method(1.0),
    "tail of a quarter, from the cells' middle": Method(0.25, centre=True),
    "tail of a quarter": Method(0.25),
    "tail of a quarter, rate x 3": Method(0.25, 3.0),
    "tail of a quarter, biases too": Method(0.25, biases=True),
}


class StraightThrough(nn.Module):
    """Weights of E experts that are rounded in the forward pass: nearest(start + LoRA), gradients as if they were not.

    Args:
        start: hidden weights, float32 [E, K, N].
        steps: of the grid, [E, K, N]; None: nothing is rounded.
        bias: [E, N].
    """

    def __init__(self, start: Tensor, steps: Tensor | None, bias: Tensor, *, train_bias: bool) -> None:
        super().__init__()
        experts, inputs, out = start.shape
        self.start, self.steps = start, steps
        self.a = nn.Parameter(torch.empty(experts, inputs, RANK).uniform_(-1, 1) / math.sqrt(inputs))
        self.b = nn.Parameter(torch.zeros(experts, RANK, out))
        self.bias = nn.Parameter(bias.float().clone(), requires_grad=train_bias)

    def weights(self) -> Tensor:
        """[E, K, N]."""
        hidden = torch.baddbmm(self.start, self.a, self.b, alpha=SCALE)
        if self.steps is None:
            return hidden
        return hidden + (grid.nearest(hidden.detach(), self.steps) - hidden.detach())


class Experts(nn.Module):
    """A layer's experts, dense, in place of `PackedExperts`."""

    def __init__(self, gate_up: StraightThrough, down: StraightThrough, limit: float) -> None:
        super().__init__()
        self.gate_up, self.down, self.limit = gate_up, down, limit

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """[T, D], int64 [T, K], [T, K] -> [T, D]."""
        gate_up, down = self.gate_up.weights(), self.down.weights()
        out = torch.zeros_like(hidden_states)
        for expert in router_indices.unique().tolist():
            tokens, slots = (router_indices == expert).nonzero(as_tuple=True)
            inner = hidden_states[tokens] @ gate_up[expert] + self.gate_up.bias[expert]
            inner = clamped_swiglu(inner, self.limit, PUBLISHED_SIGMOID_GAIN)
            rows = (inner @ down[expert] + self.down.bias[expert]) * routing_weights[tokens, slots, None]
            out = out.index_add(0, tokens, rows)
        return out


def straight_through(work: Work, number: int, name: str, method: Method, rounded: RoundedExperts | None,
                     source: AdapterFile | None) -> StraightThrough:  # fmt: skip
    """A method's initial projection: the base's, or that of a plain run after compensated rounding."""
    stem = f"model.layers.{number}.mlp.experts.{name}"
    reader = work.checkpoint if rounded is None else rounded
    blocks, scales, bias = (reader.read(stem + end) for end in ("_blocks", "_scales", "_bias"))
    start, steps = grid.values(blocks, scales), grid.steps(scales).repeat_interleave(BLOCK, dim=1)
    if source is not None and not method.centre:
        base = grid.values(*(work.checkpoint.read(stem + end) for end in ("_blocks", "_scales")))
        factors = source.layer(number)[name]
        wanted = base + (factors.a.mT @ factors.b.mT) * factors.scale
        size = start.abs() / steps
        reach = 0.49 * (0.5 + 0.5 * (size > 2) + (size > 4)) * steps  # of a cell, on its narrower side
        start = start + (wanted - start).clamp(-reach, reach)
    return StraightThrough(start, steps if method.rounded else None, bias, train_bias=method.biases)


def train(work: Work, size: str, seed: int, method: Method) -> dict[str, float]:
    """Train by a method; loss on validation and test examples."""
    torch.manual_seed(seed)
    steps = round(work.steps * method.tail)
    source = rounded = None
    if method.tail < 1:
        fewer = work.steps - steps
        plain = Work(work.directory / f"plain-{fewer}", work.base, fewer, work.rows, work.rates)
        source = AdapterFile.open(plain.adapter("experts", size, seed))
        rounded = plain.round(source, f"rounded-{size}-{seed}".replace(" ", ""), SETTINGS["compensated"], seed)[1]
    base = build_base(work.checkpoint, CPU, torch.float32, experts_per_chunk=8)
    for number, layer in enumerate(base.model.model.layers):
        packed: PackedExperts = layer.mlp.experts
        parts = [straight_through(work, number, name, method, rounded, source) for name in PROJECTIONS]
        layer.mlp.experts = Experts(*parts, packed.limit)
    parameters = [each for each in base.model.parameters() if each.requires_grad]
    recipe = compose(str(work.recipe("experts"))).config
    config = replace(recipe.trainer, learning_rate=RATES[size] * method.rate)
    optimiser = torch.optim.AdamW(parameters, betas=(config.adam_beta1, config.adam_beta2), weight_decay=0.0)
    for step, batch in zip(range(steps), batches(work, seed), strict=False):
        optimiser.param_groups[0]["lr"] = learning_rate(step, steps, config)
        hidden = hidden_states(base.model, batch.input_ids, batch.positions, batch.segments)
        loss = weighted_nll(hidden, base.model.lm_head.weight, batch) / batch.weight_sum
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimiser.step()
    return {split: held_out_loss(base.model, work.held_out(split).examples, 1024).mean for split in SPLITS}


def batches(work: Work, seed: int) -> Iterator[Batch]:
    """Packed training sequences in a seeded order."""
    data = compose(str(work.recipe("experts"))).config.data
    samples = load_split(data, "train").examples
    rows = pack([len(sample.ids) for sample in samples], 1024, np.random.default_rng([seed, 11]))
    for row in rows:
        yield collate([[samples[number] for number in row]])


def compare(work: Work, sizes: list[str], names: list[str]) -> None:
    """Make the missing runs, seed by seed, so that an interruption leaves complete comparisons."""
    for seed in SEEDS:
        for size in sizes:
            key = f"{size} after, seed {seed}"
            if key not in work.results:
                source = AdapterFile.open(work.adapter("experts", size, seed))
                plan, rounded = work.round(
                    source, f"rounded-{size}-{seed}".replace(" ", ""), SETTINGS["compensated"], seed
                )
                found = {split: work.measure(plan, rounded, split, ["compensated"]) for split in SPLITS}
                work.keep(key, {split: {n: f["loss"] for n, f in found[split]["variants"].items()} for split in SPLITS})
            for name in names:
                if (key := f"{size} {name}, seed {seed}") not in work.results:
                    work.keep(key, train(work, size, seed, METHODS[name]))
                    print(f"{key}: {work.results[key]}", flush=True)


def table(work: Work, sizes: list[str], save: str | None) -> None:
    """Print one line per rate and method; with a name, also write them to bench/results."""
    rows = []
    for size in sizes:
        seeds = [seed for seed in SEEDS if f"{size} after, seed {seed}" in work.results]
        for name in ("base", "adapter", "after", *METHODS):
            found = [figures for seed in seeds if (figures := _losses(work, size, name, seed))]
            if found:
                row: dict[str, Any] = {"rate": work.rates[size], "method": name, "seeds": len(found)}
                row |= {split: _spread([each[split] for each in found]) for split in SPLITS}
                if name not in ("base", "adapter", CONTROL):
                    unrounded = [_losses(work, size, "adapter" if name == "after" else CONTROL, n) for n in seeds]
                    pairs = zip(found, unrounded, strict=False)
                    row["test, more than unrounded"] = _spread([a["test"] - b["test"] for a, b in pairs if b])
                rows.append(row)
    facts = machine(CPU)
    title = "Training through MXFP4 rounding"
    publish(save or "rounding-aware", title, facts, rows, save=save is not None, note=NOTE, raw=work.results)


def _losses(work: Work, size: str, name: str, seed: int) -> dict[str, float] | None:
    if name in METHODS:
        found: dict[str, float] | None = work.results.get(f"{size} {name}, seed {seed}")
        return found
    variant = "compensated" if name == "after" else name
    return {split: losses[variant] for split, losses in work.results[f"{size} after, seed {seed}"].items()}


def _spread(losses: list[float]) -> str:
    return f"{mean(losses):.3f} [{min(losses):.3f}, {max(losses):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a tiny base, pretrained")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=120, help="held-out examples of each split")
    parser.add_argument("--sizes", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--save", metavar="NAME", help="write the table to bench/results/DATE-NAME")
    args = parser.parse_args()
    work = Work(args.work, args.base, args.steps, args.rows, RATES)
    compare(work, args.sizes, args.methods)
    table(work, args.sizes, args.save)


if __name__ == "__main__":
    main()
