"""Synthetic layers for `mxfp4_merge.py --synthetic`: output error and survival of roundings under several spectra."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from finetune.mxfp4.format import quantise
from finetune.rounding import grid
from finetune.rounding.compensate import Settings, compensate

OUT, INPUTS, ROWS, RANK = 256, 512, 8192, 8
SIZES = (0.003, 0.01, 0.03, 0.1)
DRAWS = 3  # of base, update and inputs


def spectra(generator: torch.Generator) -> dict[str, Callable[[int], Tensor]]:
    """Ways to draw inputs [rows, INPUTS]."""
    basis = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator))[0]
    falling = torch.arange(1, INPUTS + 1) ** -0.5
    loud = torch.ones(INPUTS)
    loud[torch.randperm(INPUTS, generator=generator)[: INPUTS // 50]] = 20.0
    mean = torch.randn(INPUTS, generator=generator)

    def draw(scale: Tensor, turn: Tensor, shift: Tensor) -> Callable[[int], Tensor]:
        gain = math.sqrt(INPUTS / float(scale.square().sum()))
        return lambda rows: gain * (torch.randn(rows, INPUTS, generator=generator) * scale) @ turn + shift

    eye, none = torch.eye(INPUTS), torch.zeros(INPUTS)
    return {
        "1/sqrt(i)": draw(falling, basis.T, none),
        "1/i": draw(falling.square(), basis.T, none),
        "outlier channels + mean": draw(loud, eye, mean),
        "white": draw(torch.ones(INPUTS), eye, none),
    }


def print_synthetic() -> None:
    """Print one line per spectrum and size: mean error and projection in outputs on new inputs, biases included."""
    print(
        f"layers {OUT} x {INPUTS}, rank {RANK}, {ROWS} calibration tokens, {DRAWS} draws: error / survival in outputs"
    )
    print("| spectrum | update | nearest | compensated, amplification 1 | compensated | seconds |")
    print("|---|---|---|---|---|---|")
    for name in spectra(torch.Generator()):
        found = {size: torch.stack([_draw(name, number, size) for number in range(DRAWS)]).mean(0) for size in SIZES}
        for size, figures in found.items():
            cells = [f"{error:.3f} / {survival:.3f}" for error, survival in figures[:6].view(3, 2).tolist()]
            print(f"| {name} | {size:.1%} | {' | '.join(cells)} | {float(figures[6]):.1f} |", flush=True)


def _draw(name: str, number: int, size: float) -> Tensor:
    """Error and survival of three ways of rounding, and processor seconds of the last: [7]."""
    draw = spectra(torch.Generator().manual_seed(number))[name]
    generator = torch.Generator().manual_seed(1000 + number)
    rows, fresh = draw(ROWS), draw(ROWS)
    mean = rows.mean(0)
    moments = ((rows - mean).T @ (rows - mean) / ROWS)[None]
    blocks, scales = quantise(torch.randn(1, OUT, INPUTS, generator=generator) * 0.02)
    base = grid.values(blocks, scales)
    update = (torch.randn(OUT, RANK, generator=generator) @ draw(RANK)).T[None].contiguous()
    update *= size * base.norm() / update.norm()
    wanted = fresh @ update[0]

    def judged(values: Tensor, *, bias: bool) -> list[float]:
        found = fresh @ (values - base)[0]
        if bias:
            found = found + mean @ (base + update - values)[0]
        error = float((found - wanted).norm() / wanted.norm())
        return [error, float((found * wanted).sum() / wanted.square().sum())]

    nearest = grid.nearest(base + update, grid.steps(scales).repeat_interleave(32, dim=1))
    once = compensate(base, scales, update, moments, Settings(solves=1))
    started = time.process_time()
    found = compensate(base, scales, update, moments, Settings())
    seconds = time.process_time() - started
    return torch.tensor(
        [*judged(nearest, bias=False), *judged(once.values, bias=True), *judged(found.values, bias=True), seconds]
    )
