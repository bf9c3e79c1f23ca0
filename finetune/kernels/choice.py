"""Choice of a run's kernels: the one place that decides between the reference in plain PyTorch and a faster kernel.

A fast kernel is used where it can run on this device and agrees there with the reference on a small random problem.
`auto` falls back to the reference; a kernel that the recipe demands and that cannot be used is an error. The choice and
its reason are logged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import MachineError
from finetune.kernels.attention import Attention, plan_attention, sink_attention
from finetune.kernels.experts import ExpertBlock, ExpertWeights, LoraFactors, Mxfp4Experts, expert_block
from finetune.kernels.flash import flash_sink_attention
from finetune.kernels.grouped import runs_in_one_launch
from finetune.kernels.rotary import rotate
from finetune.mxfp4.format import BLOCK, quantise

OLDEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 in hardware, and what torch's flash kernels are built for
OLDEST_TRITON = (3, 6)  # what torch 2.11 comes with, and the oldest that the tests compile with
# Largest relative RMS difference from the reference, of output or a gradient. Rounding to bfloat16 gives 0.01 in the
# expert block and 4e-3 in attention.
LARGEST_EXPERT_DIFFERENCE = 0.03
LARGEST_ATTENTION_DIFFERENCE = {
    torch.bfloat16: 0.03,
    torch.float16: 0.01,
    torch.float32: 1e-4,
    torch.float64: 1e-10,
}

ExpertKernel = Literal["auto", "triton", "reference"]
AttentionKernel = Literal["auto", "flash", "reference"]
ATTENTION_KERNELS: dict[str, Attention] = {"reference": sink_attention, "flash": flash_sink_attention}


@dataclass(frozen=True)
class KernelChoice:
    """A chosen kernel.

    Attributes:
        option: the key of the recipe's `model` that it answers, such as `expert_kernel`.
        kernel: its name, such as `triton` or `reference`.
        reason: why it was chosen.
    """

    option: str
    kernel: str
    reason: str

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.option.replace('_', ' ')}: {self.kernel} ({self.reason})"


@dataclass(frozen=True)
class ExpertDims:
    """Dims that expert kernels are chosen for: D, F, and how many experts are dequantised at a time."""

    hidden: int
    width: int
    experts_per_chunk: int


@dataclass(frozen=True)
class AttentionDims:
    """Dims that attention kernels are chosen for: query heads, key heads, width of a head, and the layers' window."""

    heads: int
    key_heads: int
    width: int
    window: int


def choose_expert_kernel(
    wanted: ExpertKernel, dims: ExpertDims, device: torch.device, dtype: torch.dtype
) -> KernelChoice:
    """Choose Triton where it runs on this device and agrees with the reference on a few random tokens.

    Args:
        wanted: the recipe's `model.expert_kernel`.
        dims: of the model's experts.
        device, dtype: of the activations.

    Raises:
        MachineError: the recipe demands Triton, and it cannot be used here.
    """
    cost = "" if device.type == "cpu" else "; slower: bias, update and activation are separate passes"
    return _choose(
        "expert_kernel",
        wanted,
        "triton",
        obstacle=lambda: triton_obstacle(dims, device, dtype),
        reason=lambda: _describe_triton(device),
        fallback_reason=lambda obstacle: obstacle + cost,
    )


def choose_attention_kernel(
    wanted: AttentionKernel, dims: AttentionDims, device: torch.device, dtype: torch.dtype
) -> KernelChoice:
    """Choose flash attention where it runs on this device and agrees with the reference on a few random segments.

    Args:
        wanted: the recipe's `model.attention_kernel`.
        dims: of the model's attention.
        device, dtype: of the activations.

    Raises:
        MachineError: the recipe demands flash, and it cannot be used here.
    """
    on = "GPU" if device.type == "cuda" else "CPU"
    return _choose(
        "attention_kernel",
        wanted,
        "flash",
        obstacle=lambda: flash_obstacle(dims, device, dtype),
        reason=lambda: f"torch's own {on} kernel with sinks; agrees with the reference here",
        fallback_reason=lambda obstacle: f"slower on long sequences, because {obstacle}",
    )


def _choose(
    option: str,
    wanted: str,
    fast: str,
    *,
    obstacle: Callable[[], str | None],
    reason: Callable[[], str],
    fallback_reason: Callable[[str], str],
) -> KernelChoice:
    """The frame of both choices: `obstacle` gives why the fast kernel cannot be used, or None."""
    if wanted == "reference":
        return KernelChoice(option, "reference", f"as model.{option} says")
    found = obstacle()
    if found is None:
        return KernelChoice(option, fast, reason())
    if wanted == fast:
        raise MachineError(
            f"model.{option} is {fast}, but {found}",
            fix=f"set model.{option}=auto, which takes the slower reference kernel where {fast} cannot be used",
        )
    return KernelChoice(option, "reference", fallback_reason(found))


def _trial_obstacle(measure: Callable[[], float], largest: float, expected: type[Exception] = Exception) -> str | None:
    """Why a kernel failed its comparison with the reference, as a clause; None if it did not.

    Args:
        measure: gives the difference from the reference.
        largest: difference that is allowed.
        expected: errors that mean that the kernel does not run on this machine.
    """
    try:
        difference = measure()
    except expected as error:
        return f"it failed on this machine: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not difference <= largest:
        return f"its results differ from the reference's by {difference:.2g} on this machine"
    return None


def _largest_difference(reference: list[Tensor], fast: list[Tensor]) -> float:
    """Largest relative RMS difference of any output or gradient."""
    return max(_relative_rms(ours, exact) for exact, ours in zip(reference, fast, strict=True))


def _relative_rms(ours: Tensor, exact: Tensor) -> float:
    error = (ours.double() - exact.double()).square().mean().sqrt()
    return (error / exact.double().square().mean().sqrt()).item()


# Experts


def expert_block_of(kernel: str) -> ExpertBlock:
    """The function behind a kernel's name. Triton is imported here and nowhere before."""
    if kernel == "reference":
        return expert_block
    from finetune.kernels.experts_fused import fused_expert_block

    return fused_expert_block


def triton_obstacle(dims: ExpertDims, device: torch.device, dtype: torch.dtype) -> str | None:
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
    odd = _odd_dims(dims)
    if odd is not None:
        return odd
    # A compiler that fails, a kernel that does not launch: Triton raises many kinds of error.
    return _trial_obstacle(lambda: triton_difference(device, dtype), LARGEST_EXPERT_DIFFERENCE)


def triton_missing() -> str | None:
    """Why triton cannot be imported, as a clause; None if a version is installed that the kernels support."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (torch for CUDA on Linux comes with it)"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is installed without its package data, so its version is unknown"
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < OLDEST_TRITON:
        return f"triton is {found}, and the kernels need {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def _describe_triton(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    loop = "" if runs_in_one_launch(device) else "; matrix products expert by expert, this GPU has no grouped one"
    return f"CUDA, sm_{major}{minor}, triton {version('triton')}{loop}"


def _odd_dims(dims: ExpertDims) -> str | None:
    for name, size in (("hidden", dims.hidden), ("expert", dims.width)):
        if size % BLOCK:
            return f"it takes widths that are whole blocks of {BLOCK}, and the {name} width is {size}"
    if dims.experts_per_chunk * 2 * dims.width * dims.hidden >= 2**34:  # words of 8 values are counted in 32 bits
        return f"model.experts_per_chunk={dims.experts_per_chunk} is more than it can count"
    return None


def triton_difference(device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> float:
    """Largest relative RMS difference of output and gradients between Triton and reference on a small random layer.

    37 tokens over 5 of 6 experts in two chunks, a rank that needs padding, widths that no tile divides.
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
    x, router_weights, *factors = leaves
    updates = (LoraFactors(factors[0], factors[1], 2.0), LoraFactors(factors[2], factors[3], 2.0))
    grad_out = random(tokens, hidden).to(device, dtype)
    results = []
    for kernel in ("reference", "triton"):
        out = expert_block_of(kernel)(x, ids, router_weights, weights, *updates, None)
        results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    return _largest_difference(*results)


# Attention


def flash_obstacle(dims: AttentionDims, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash attention cannot be used here, as a clause; None if it can."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"it needs an Ampere GPU or newer (8.0), and {torch.cuda.get_device_name(device)} is {capability}"
        if not torch.backends.cuda.is_flash_attention_available():
            return f"this torch ({torch.__version__}) was built without it"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"on a GPU it takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        if dims.width % 8 or dims.width > 256:
            return f"it takes heads of a multiple of 8 up to 256 wide, not {dims.width}"
    largest = LARGEST_ATTENTION_DIFFERENCE[dtype]
    return _trial_obstacle(lambda: flash_difference(dims, device, dtype), largest, RuntimeError)


def rotary_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel for rotary positions cannot be used here, as a clause; None if it can."""
    if device.type != "cuda":
        return "it runs on a GPU only"
    missing = triton_missing() if torch.version.hip is None else "the kernel is made for NVIDIA GPUs"
    if missing is not None:
        return missing
    return _trial_obstacle(lambda: rotary_difference(device, dtype), LARGEST_ATTENTION_DIFFERENCE[dtype])


def rotary_difference(device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> float:
    """Largest relative RMS difference of output and gradient between Triton and plain rotary positions."""
    generator = torch.Generator().manual_seed(seed)
    x, grad_out = (torch.randn(37, 3, 64, generator=generator).to(device, dtype) for _ in range(2))
    angles = torch.rand(37, 32, generator=generator) * 6
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    results = []
    for fused in (False, True):
        leaf = x.clone().requires_grad_()
        out = rotate(leaf, cos, sin, fused=fused)
        results.append([out, *torch.autograd.grad(out, leaf, grad_out)])
    return _largest_difference(*results)


def flash_difference(dims: AttentionDims, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> float:
    """Largest relative RMS difference of output and gradients between flash and reference.

    On four random segments (a single token, a prefix longer than the window, one that continues it, another), with the
    window and without.
    """
    lengths = (1, dims.window + 22, 30, 119)
    segments = torch.repeat_interleave(torch.tensor(lengths))
    prefixes = torch.where(segments == 2, 1, segments)
    positions = torch.cat([torch.arange(length) for length in lengths])
    positions[segments == 2] += lengths[1]
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    count = len(segments)
    q, k, v = (random(count, heads, dims.width) for heads in (dims.heads, dims.key_heads, dims.key_heads))
    leaves = tuple(leaf.requires_grad_() for leaf in (q, k, v, random(dims.heads)))
    grad_out = random(count, dims.heads, dims.width)
    differences = []
    for window in (None, dims.window):
        plan = plan_attention(segments[None], positions[None], window, prefixes=prefixes[None]).to(device)
        results = []
        for attention in (sink_attention, flash_sink_attention):
            out = attention(leaves[0], leaves[1], leaves[2], leaves[3], plan, dims.width**-0.5)
            results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
        differences.append(_largest_difference(*results))
    return max(differences)
