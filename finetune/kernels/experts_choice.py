"""Which expert block a run uses, and why: the one place that chooses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import MachineError
from finetune.kernels.dispatch import LoraExperts
from finetune.kernels.experts import ExpertWeights, LoraFactors, Mxfp4Experts, expert_block
from finetune.kernels.grouped import runs_in_one_launch
from finetune.mxfp4.constants import BLOCK
from finetune.mxfp4.format import quantise

OLDEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 in hardware
OLDEST_TRITON = (3, 6)  # what torch 2.11 comes with, and the oldest that the tests compile with
LARGEST_DIFFERENCE = 0.03  # relative RMS, of output or a gradient, from the reference; rounding to bfloat16 gives 0.01

ExpertKernel = Literal["auto", "triton", "reference"]
Block = Callable[
    [Tensor, Tensor, Tensor, ExpertWeights, LoraFactors | None, LoraFactors | None, LoraExperts | None], Tensor
]
"""See `finetune.kernels.experts.expert_block`."""


@dataclass(frozen=True)
class ExpertDims:
    """What expert kernels are chosen for: D, F and how many experts are dequantised at a time."""

    hidden: int
    width: int
    experts_per_chunk: int


@dataclass(frozen=True)
class ExpertChoice:
    """The kernel in use (`triton` or `reference`) and the reason."""

    kernel: str
    reason: str

    def describe(self) -> str:
        """One line for the person."""
        return f"expert kernel: {self.kernel} ({self.reason})"


def expert_block_of(kernel: str) -> Block:
    """The function behind a kernel's name. Triton is imported here and nowhere before."""
    if kernel == "reference":
        return expert_block
    from finetune.kernels.experts_fused import fused_expert_block

    return fused_expert_block


def choose_expert_kernel(
    wanted: ExpertKernel, shape: ExpertDims, device: torch.device, dtype: torch.dtype
) -> ExpertChoice:
    """Choose Triton where it runs here and agrees with the reference on a few random rows, else the reference.

    Args:
        wanted: the recipe's `model.expert_kernel`.
        shape: of the model's experts.
        device, dtype: of the activations.

    Raises:
        MachineError: the recipe demands Triton, and it cannot be used here.
    """
    if wanted == "reference":
        return ExpertChoice("reference", "as model.expert_kernel says")
    obstacle = triton_obstacle(shape, device, dtype)
    if obstacle is None:
        major, minor = torch.cuda.get_device_capability(device)
        loop = "" if runs_in_one_launch(device) else "; matrix products expert by expert, this GPU has no grouped one"
        return ExpertChoice("triton", f"CUDA, sm_{major}{minor}, triton {version('triton')}{loop}")
    if wanted == "triton":
        raise MachineError(
            f"model.expert_kernel is triton, but {obstacle}",
            fix="set model.expert_kernel=auto, which takes the reference path where Triton cannot be used",
        )
    cost = "" if device.type == "cpu" else "; slower: bias, update and activation are passes of their own"
    return ExpertChoice("reference", obstacle + cost)


def triton_obstacle(shape: ExpertDims, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot be used here, as a clause; None if they can."""
    if device.type != "cuda":
        return "no CUDA device" if not torch.cuda.is_available() else f"the base is on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs and this torch is for AMD"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        name, is_sm = torch.cuda.get_device_name(device), f"sm_{capability[0]}{capability[1]}"
        return f"it needs an Ampere GPU or newer (sm_80), and {name} is {is_sm}"
    missing = triton_missing()
    if missing is not None:
        return missing
    if dtype != torch.bfloat16:
        return f"on a GPU it computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    odd = _odd_shape(shape)
    if odd is not None:
        return odd
    try:
        difference = triton_difference(device, dtype)
    except Exception as error:  # a compiler that fails, a kernel that does not launch: whatever Triton raises
        return f"it failed on this machine: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not difference <= LARGEST_DIFFERENCE:
        return f"its results differ from the reference's by {difference:.2g} on this machine"
    return None


def triton_missing() -> str | None:
    """Why triton cannot be imported, as a clause; None if a version is installed that the kernels know."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (torch for CUDA on Linux comes with it)"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is there without its package data, so its version is unknown"
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < OLDEST_TRITON:
        return f"triton is {found}, and the kernels need {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def _odd_shape(shape: ExpertDims) -> str | None:
    for name, size in (("hidden", shape.hidden), ("expert", shape.width)):
        if size % BLOCK:
            return f"it takes widths that are whole blocks of {BLOCK}, and the {name} width is {size}"
    if shape.experts_per_chunk * 2 * shape.width * shape.hidden >= 2**34:  # words of 8 values are counted in 32 bits
        return f"model.experts_per_chunk={shape.experts_per_chunk} is more than it can count"
    return None


def triton_difference(device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> float:
    """Largest relative RMS difference of output and gradients between Triton and reference on a small random layer.

    37 rows over 5 of 6 experts in two chunks, a rank that needs padding, widths that no tile divides.
    """
    hidden, width, experts, rank, tokens, top_k = 96, 160, 6, 5, 37, 3
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    def packed(out: int, inputs: int) -> Mxfp4Experts:
        blocks, scales = quantise(random(experts, out, inputs) * 0.2)
        return Mxfp4Experts(blocks.to(device), scales.to(device), random(experts, out).to(device, dtype))

    weights = ExpertWeights(packed(2 * width, hidden), packed(hidden, width), 7.0, 1.702, experts_per_chunk=4)
    ids = torch.stack([torch.randperm(experts - 1, generator=generator)[:top_k] for _ in range(tokens)]).to(device)
    sizes = [(tokens, hidden), (tokens, top_k)]
    factor_sizes = [
        (experts, rank, hidden),
        (experts, 2 * width, rank),
        (experts, rank, width),
        (experts, hidden, rank),
    ]
    leaves = [(random(*size) * 0.3).to(device, dtype).requires_grad_() for size in (*sizes, *factor_sizes)]
    x, mix, *factors = leaves
    updates = (LoraFactors(factors[0], factors[1], 2.0), LoraFactors(factors[2], factors[3], 2.0))
    grad_out = random(tokens, hidden).to(device, dtype)
    results = []
    for kernel in ("reference", "triton"):
        out = expert_block_of(kernel)(x, ids, mix, weights, *updates, None)
        results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    return max(_relative_rms(ours, exact) for exact, ours in zip(*results, strict=True))


def _relative_rms(ours: Tensor, exact: Tensor) -> float:
    error = (ours.double() - exact.double()).square().mean().sqrt()
    return (error / exact.double().square().mean().sqrt()).item()
