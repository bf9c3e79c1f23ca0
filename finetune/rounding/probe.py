"""The number of experts to round at once, from free memory, and the time a rounding will take, from a probe."""

from __future__ import annotations

import time

import torch

from finetune.arch import Arch
from finetune.machine import free_memory
from finetune.mxfp4.format import BLOCK
from finetune.rounding.compensate import Settings, descend, error_factor, gptq

_MEMORY_SHARE = 0.4  # of what is free
_MATRIX_COPIES = 9  # float32 [K, N] that one expert's solution needs at its peak
_MOMENT_COPIES = 7  # float32 [K, K], the float64 factorisation counted twice
_MEAN_SOLVES = 2.5  # of the search for the amplification; measured 1.6 to 3.4 on the tiny base
_PROBE_BLOCKS = 2  # of 32 columns


def experts_at_once(arch: Arch, device: torch.device) -> int:
    """Number of experts whose matrices can be solved together in the memory that is free."""
    free = free_memory(device)
    widths = ((arch.hidden, 2 * arch.expert_width), (arch.expert_width, arch.hidden))
    each = max(4 * (_MATRIX_COPIES * inputs * out + _MOMENT_COPIES * inputs * inputs) for inputs, out in widths)
    return max(1, min(arch.num_experts, int(free * _MEMORY_SHARE / each)))


def rounding_seconds(arch: Arch, num_layers: int, at_once: int, device: torch.device, settings: Settings) -> float:
    """Seconds that some layers will take, from a probe of a few columns of one chunk of experts.

    Both solvers do the same work for every block of columns, so a few blocks of the real height and number of experts
    predict the rest. The forward pass over the calibration tokens is not counted: it is a training step's without the
    backward.
    """
    total = 0.0
    chunks = -(-arch.num_experts // at_once)
    for inputs, out in ((arch.hidden, 2 * arch.expert_width), (arch.expert_width, arch.hidden)):
        blocks = min(_PROBE_BLOCKS, inputs // BLOCK)
        once = _probe(at_once, blocks * BLOCK, out, device, settings)
        # Time outside a block's own columns grows with the rest of the matrix: counted by the products' size.
        products = _products(at_once, inputs, out, device, settings)
        total += once * (inputs / (blocks * BLOCK)) * chunks + chunks * products
    return total * _MEAN_SOLVES * num_layers


def _probe(experts: int, inputs: int, out: int, device: torch.device, settings: Settings) -> float:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(experts, inputs, out, generator=generator).to(device)
    moments = torch.eye(inputs, device=device).expand(experts, -1, -1).contiguous()
    steps = torch.ones(experts, inputs // BLOCK, out, device=device)
    factor, _ = error_factor(moments, settings.damping)
    gptq(target[:1], factor[:1], steps[:1])  # warm-up
    started = _now(device)
    rounded, _ = gptq(target, factor, steps)
    one_sweep = _now(device)
    descend(rounded, target + 0.5, moments, steps, 1)
    done = _now(device)
    return (one_sweep - started) + settings.sweeps * (done - one_sweep)


def _products(experts: int, inputs: int, out: int, device: torch.device, settings: Settings) -> float:
    """Seconds of the matrix products over whole matrices: one for the error feedback's half, one a sweep."""
    rows = torch.ones(experts, BLOCK, inputs, device=device)
    matrix = torch.ones(experts, inputs, out, device=device)
    torch.bmm(rows[:1], matrix[:1])
    started = _now(device)
    torch.bmm(rows, matrix)
    return (_now(device) - started) * (inputs / BLOCK) * (settings.sweeps + 1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
