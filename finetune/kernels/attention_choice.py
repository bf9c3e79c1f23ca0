"""Which attention a run uses, and why: the one place that chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import MachineError
from finetune.kernels.attention import AttentionPlan, plan_attention, sink_attention
from finetune.kernels.flash import flash_sink_attention

OLDEST_CAPABILITY = (8, 0)  # Ampere: what torch's flash kernels are built for
# Relative RMS difference from the reference, of output or a gradient. Rounding gives about 4e-3 in bfloat16.
LARGEST_DIFFERENCE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 1e-4, torch.float64: 1e-10}

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, AttentionPlan, float], Tensor]
"""(q, k, v, sinks, plan, scaling) -> output; see `finetune.kernels.attention.sink_attention`."""

KERNELS: dict[str, Attention] = {"reference": sink_attention, "flash": flash_sink_attention}


@dataclass(frozen=True)
class AttentionDims:
    """What attention kernels are chosen for: query heads, key heads, width of a head, and the layers' window."""

    heads: int
    key_heads: int
    width: int
    window: int


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel in use (a key of `KERNELS`) and the reason."""

    kernel: str
    reason: str

    def describe(self) -> str:
        """One line for the person."""
        return f"attention: {self.kernel}, {self.reason}"


def choose_attention(
    wanted: Literal["auto", "flash", "reference"], shape: AttentionDims, device: torch.device, dtype: torch.dtype
) -> AttentionChoice:
    """Choose flash where it runs here and agrees with the reference on a few random segments, else the reference.

    Args:
        wanted: the recipe's `model.attention_kernel`.
        shape: of the model's attention.
        device, dtype: of the activations.

    Raises:
        MachineError: the recipe demands flash, and it cannot be used here.
    """
    if wanted == "reference":
        return AttentionChoice("reference", "as model.attention_kernel says")
    obstacle = flash_obstacle(shape, device, dtype)
    if obstacle is None:
        on = "GPU" if device.type == "cuda" else "CPU"
        return AttentionChoice("flash", f"torch's own {on} kernel with sinks; agrees with the reference here")
    if wanted == "flash":
        raise MachineError(
            f"model.attention_kernel is flash, but {obstacle}",
            fix="set model.attention_kernel=auto, which takes the slower reference path where flash cannot be used",
        )
    return AttentionChoice("reference", f"slower on long rows, because {obstacle}")


def flash_obstacle(shape: AttentionDims, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the flash path cannot be used here, as a clause; None if it can."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"it needs an Ampere GPU or newer (8.0), and {torch.cuda.get_device_name(device)} is {capability}"
        if not torch.backends.cuda.is_flash_attention_available():
            return f"this torch ({torch.__version__}) was built without it"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"on a GPU it takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        if shape.width % 8 or shape.width > 256:
            return f"it takes heads of a multiple of 8 up to 256 wide, not {shape.width}"
    try:
        difference = flash_difference(shape, device, dtype)
    except RuntimeError as error:
        return f"it failed on this machine: {(str(error).splitlines() or [''])[0]}"
    if not difference <= LARGEST_DIFFERENCE[dtype]:
        return f"its results differ from the reference's by {difference:.2g} on this machine"
    return None


def flash_difference(shape: AttentionDims, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> float:
    """Largest relative RMS difference of output and gradients between flash and reference.

    On four random segments (a single token, a prefix longer than the window, one that continues it, another), with the
    window and without.
    """
    lengths = (1, shape.window + 22, 30, 119)
    segments = torch.repeat_interleave(torch.tensor(lengths))
    prefixes = torch.where(segments == 2, 1, segments)
    positions = torch.cat([torch.arange(length) for length in lengths])
    positions[segments == 2] += lengths[1]
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    count = len(segments)
    q, k, v = (random(count, heads, shape.width) for heads in (shape.heads, shape.key_heads, shape.key_heads))
    leaves = tuple(leaf.requires_grad_() for leaf in (q, k, v, random(shape.heads)))
    grad_out = random(count, shape.heads, shape.width)
    differences = []
    for window in (None, shape.window):
        plan = plan_attention(segments[None], positions[None], window, prefixes=prefixes[None]).to(device)
        results = []
        for attention in (sink_attention, flash_sink_attention):
            out = attention(leaves[0], leaves[1], leaves[2], leaves[3], plan, shape.width**-0.5)
            results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
        differences += [_relative_rms(flash, exact) for exact, flash in zip(*results, strict=True)]
    return max(differences)


def _relative_rms(ours: Tensor, exact: Tensor) -> float:
    error = (ours.double() - exact.double()).square().mean().sqrt()
    return (error / exact.double().square().mean().sqrt()).item()
