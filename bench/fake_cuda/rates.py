"""Assumed rates of GPUs, and the time of a counted step by them.

Nothing here is measured yet: published peaks times the share that kernels of this kind reach elsewhere (docs/log.md).
`python bench/step.py` measures the same step on a GPU; correct the rates here then. Until that day a total is right
within about a quarter.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from fake_cuda.counts import Call, Cost, Counts

UNCERTAINTY = 0.25
HOST_SECONDS = 6e-6  # of Python and dispatcher per launch, forward and backward alike
SHORTEST_KERNEL = 2.5e-6  # seconds on the device, however little it does
WAIT_SECONDS = 20e-6  # a copy to the host, and the device idle until new launches arrive
ROWS_AT_FULL_RATE = 512  # routed tokens per expert from which a grouped product runs at its full rate
ROWS_AT_LOW_RATE = 128


@dataclass(frozen=True)
class Gpu:
    """Assumed rates of one kind of GPU.

    Attributes:
        capability: compute capability.
        gigabytes: of memory.
        bandwidth: bytes per second of elementwise kernels.
        dense, grouped: floating-point operations per second of matrix products in bfloat16; grouped ones reach
            `grouped_small` at 128 routed tokens per expert.
        attention_forward, attention_backward: of flash attention over full layers.
    """

    capability: tuple[int, int]
    gigabytes: float
    bandwidth: float
    dense: float
    grouped: float
    grouped_small: float
    attention_forward: float
    attention_backward: float

    def grouped_rate(self, rows: int) -> float:
        """Of a grouped product with so many routed tokens per expert, interpolated."""
        share = (rows - ROWS_AT_LOW_RATE) / (ROWS_AT_FULL_RATE - ROWS_AT_LOW_RATE)
        if share <= 0:
            return self.grouped_small * max(rows, 1) / ROWS_AT_LOW_RATE
        return self.grouped_small + min(1.0, share) * (self.grouped - self.grouped_small)


GPUS = {
    "h100": Gpu((9, 0), 84.0, 2.65e12, 610e12, 545e12, 350e12, 340e12, 260e12),
    "h200": Gpu((9, 0), 150.0, 3.80e12, 610e12, 545e12, 350e12, 340e12, 260e12),
    "a100": Gpu((8, 0), 85.0, 1.60e12, 250e12, 200e12, 130e12, 190e12, 140e12),
    "4090": Gpu((8, 9), 25.3, 0.90e12, 150e12, 120e12, 90e12, 140e12, 100e12),
    "b200": Gpu((10, 0), 190.0, 6.40e12, 1400e12, 1100e12, 600e12, 600e12, 450e12),
}

EXPERT_FILES = ("kernels/experts", "kernels/grouped.py", "model/experts.py")
DEQUANTISE = "experts: dequantise"


def part_of(call: Call) -> str:
    """The part of the step that a call belongs to, as the table names it."""
    owner, name = call.owner, call.name
    if owner == "triton":
        return DEQUANTISE if name == "augment_kernel" else _triton_part(name)
    if name.startswith("_grouped_mm"):
        return "experts: thin LoRA products" if "thin" in name else "experts: grouped products"
    if name.startswith("flash"):
        return "attention: " + name.replace("flash", "flash,")
    if owner.startswith(EXPERT_FILES):
        return "experts: gather, SwiGLU, combine, copies"
    if owner == "kernels/dispatch.py":
        return "experts: dispatch"
    if owner in ("kernels/flash.py", "model/attention.py", "kernels/attention.py"):
        return "attention: sinks, copies"
    if owner in ("model/nf4.py", "adapters/lora.py"):
        return "attention: LoRA" if "thin" in name or name not in ("mm", "addmm") else "attention: projections"
    if owner.startswith("kernels/loss_head.py"):
        return "loss head"
    if owner.startswith(("objectives/", "train/step.py", "model/usage.py")):
        return "losses, router terms"
    if call.phase == "update" or owner.startswith("train/"):
        return "optimiser"
    if name in ("mm", "addmm", "bmm"):
        return "attention: projections" if "thin" not in name else "attention: LoRA"
    return "norms, residuals, rope, router"


def _triton_part(name: str) -> str:
    if "rope" in name or "norm" in name:
        return "norms, residuals, rope, router"
    return "experts: products from MXFP4" if "mxfp4" in name else "experts: gather, SwiGLU, combine, copies"


def device_seconds(call: Call, cost: Cost, gpu: Gpu) -> float:
    """Time on the device: what limits it, bytes or arithmetic, and never less than a kernel's shortest time."""
    rate = gpu.dense
    if call.name.startswith("_grouped_mm"):
        rate = gpu.grouped_rate(call.rows)
    elif call.name.startswith("flash"):
        rate = gpu.attention_forward if "forward" in call.name else gpu.attention_backward
        if "window" in call.name:
            rate /= 2  # blocks at the window's edge are computed and thrown away
    return max(cost.num_bytes / gpu.bandwidth, cost.flops / rate, cost.launches * SHORTEST_KERNEL)


@dataclass
class Part:
    """One row of the table."""

    launches: int = 0
    num_bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0


def parts_of(counts: Counts, gpu: Gpu) -> dict[str, Part]:
    """Every part of the step with its time on the device, the longest first."""
    parts: defaultdict[str, Part] = defaultdict(Part)
    for call, cost in counts.costs.items():
        part = parts[part_of(call)]
        part.launches += cost.launches
        part.num_bytes += cost.num_bytes
        part.flops += cost.flops
        part.seconds += device_seconds(call, cost, gpu)
    return dict(sorted(parts.items(), key=lambda item: -item[1].seconds))


def step_seconds(counts: Counts, gpu: Gpu) -> tuple[float, float]:
    """Time of the step: of the device, and of the host that launches; the larger one counts, waits come on top."""
    launches: defaultdict[str, int] = defaultdict(int)
    device: defaultdict[str, float] = defaultdict(float)
    for call, cost in counts.costs.items():
        launches[call.phase] += cost.launches
        device[call.phase] += device_seconds(call, cost, gpu)
    waits = WAIT_SECONDS * counts.waits.total()
    return sum(device.values()) + waits, sum(
        max(HOST_SECONDS * launches[phase], device[phase]) for phase in device
    ) + waits
