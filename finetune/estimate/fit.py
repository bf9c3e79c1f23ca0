"""A recipe against a machine: device memory and whether it fits, host memory, disk, and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune.arch import Arch
from finetune.config.schema import RunConfig
from finetune.estimate.inputs import BaseInfo, StepProfile, step_profile
from finetune.estimate.memory import (
    CONTEXT_BYTES,
    MemoryEstimate,
    NamedBytes,
    estimate_memory,
    lora_parameters,
    state_bytes,
)

GIB = 2**30
USABLE_BYTES_PER_GB = 84.0e9 / 80  # an "80 GB" card has 85.5e9 to 85.9e9 bytes, some of which the driver reserves
LENGTH_STEP = 256
HOST_PROCESS_BYTES = 3e9  # Python, torch and CUDA's libraries; an assumption until it is measured
H100_TFLOPS = 989.0  # bfloat16, dense, H100 and H200 SXM (NVIDIA's data sheet)
EFFICIENCY = (0.2, 0.5)  # of the GPU's peak; the kernels' model (bench/README.md) says about 0.45 at 16k tokens
ATTENTION_BACKWARD = 2.5  # products of a backward pass over those of a forward pass


@dataclass(frozen=True)
class Budget:
    """Memory that a run may take.

    Attributes:
        num_bytes: for weights, tensors, allocator and context.
        label: the device, in words.
        on_gpu: a GPU's memory; otherwise a host's.
    """

    num_bytes: float
    label: str
    on_gpu: bool

    @classmethod
    def of_card(cls, gib: float) -> Budget:
        """A GPU that is sold as having so many GB."""
        usable = gib * USABLE_BYTES_PER_GB
        label = f'a GPU of "{gib:g} GB": {usable / 1e9:.1f}e9 bytes = {usable / GIB:.1f} GiB usable'
        return cls(usable, label, on_gpu=True)

    @classmethod
    def of_gpu(cls, name: str, total_bytes: int, free_bytes: int) -> Budget:
        """A GPU of this machine. This process's own context is already missing from the free bytes: it is added."""
        label = f"{name}: {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free"
        return cls(min(total_bytes, free_bytes + CONTEXT_BYTES), label, on_gpu=True)

    @classmethod
    def of_host(cls, available_bytes: int) -> Budget:
        """The memory of this machine, for a run on its CPU."""
        return cls(available_bytes, f"this machine's memory: {available_bytes / GIB:.1f} GiB available", on_gpu=False)


@dataclass(frozen=True)
class Fit:
    """A recipe's memory against a budget."""

    memory: MemoryEstimate
    budget: Budget

    @property
    def fits(self) -> bool:
        """Whether the estimated peak is within the budget."""
        return self.over_bytes <= 0

    @property
    def over_bytes(self) -> float:
        """Bytes beyond the budget; negative: to spare."""
        return self.memory.total_bytes - self.budget.num_bytes


def fit(config: RunConfig, arch: Arch, budget: Budget) -> Fit:
    """Estimate a recipe's peak and compare it with a budget."""
    return Fit(estimate_memory(arch, step_profile(config, arch, on_gpu=budget.on_gpu)), budget)


def longest_sequences(step: StepProfile, arch: Arch, budget: Budget) -> int:
    """Tokens in the longest sequences that fit, all else unchanged, in steps of 256; 0 if none does."""

    def fits(length: int) -> bool:
        longer = replace(step, sequence_tokens=length, longest_example=length)
        return estimate_memory(arch, longer).total_bytes <= budget.num_bytes

    low, high = 0, arch.max_positions // LENGTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * LENGTH_STEP) else (low, middle - 1)
    return low * LENGTH_STEP


def host_parts(arch: Arch, step: StepProfile) -> list[NamedBytes]:
    """Host memory of one rank of a run on a GPU, at its peak."""
    count = sum(lora_parameters(arch, step))
    states = count * state_bytes(step)
    table = arch.vocab_size * arch.hidden * 2
    blocks = arch.num_experts * 2 * arch.expert_width * arch.hidden / 2
    kept = arch.num_layers * step.tokens * arch.hidden * step.compute_bytes
    parts = [
        NamedBytes("Python, torch, CUDA libraries", HOST_PROCESS_BYTES),
        NamedBytes("the largest tensor, while reading", max(table, blocks)),
        NamedBytes("a checkpoint, while saving", count * step.adapter_bytes + states),
        NamedBytes("input embedding", table if step.embedding_on_cpu else 0),
        NamedBytes("optimiser states", states if step.states_on_cpu or step.optimizer.startswith("paged") else 0),
        NamedBytes("activation checkpoints", kept if step.checkpointing and step.offload else 0),
    ]
    return [part for part in parts if part.num_bytes]


def disk_parts(base: BaseInfo, config: RunConfig, step: StepProfile) -> list[NamedBytes]:
    """Disk space of the base, the run directory, and the exports that can be made from it."""
    count = sum(lora_parameters(base.arch, step))
    adapter = count * step.adapter_bytes
    checkpoint = count * (step.adapter_bytes + state_bytes(step))
    # A new checkpoint is complete before an old one is removed; the best one stays beside the newest.
    kept = config.save.keep + 1 + (config.save.best_metric != "none")
    native = base.arch.num_bytes()
    return [
        NamedBytes("base", base.file_bytes or native, "download" if base.file_bytes is None else "here already"),
        NamedBytes("run directory", kept * checkpoint + adapter, f"up to {kept} checkpoints, the adapter"),
        NamedBytes("adapter", adapter, "part of the run directory"),
        NamedBytes("merged export, bf16", base.arch.num_parameters * 2, "if you make one"),
        NamedBytes("merged export, mxfp4", native, "if you make one"),
    ]


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds per optimiser step, from fast to slow: arithmetic divided by a share of the GPU's peak, not measured.

    Attributes:
        flops_per_token: arithmetic of a token's forward and backward, recomputation included.
        tokens_per_step: of all ranks.
        fast_seconds, slow_seconds: per step.
        basis: how they were worked out.
    """

    flops_per_token: float
    tokens_per_step: int
    fast_seconds: float
    slow_seconds: float
    basis: str


def flops_per_token(arch: Arch, step: StepProfile) -> float:
    """Multiplications and additions for one token, averaged over an example of the greatest length.

    The base is frozen, so its products have one gradient, not two: a backward pass costs what a forward pass does.
    """
    linear = 2 * (arch.attention_weights + arch.router_parameters + arch.num_active_experts * arch.expert_weights)
    head = 2 * arch.vocab_size * arch.hidden * step.trained_share
    seen = (step.longest_example + 1) / 2
    sliding = arch.num_layers - arch.full_layers
    pairs = arch.full_layers * seen + sliding * min(seen, arch.sliding_window)
    scores = 4 * arch.query_size * pairs
    # Tokens routed to experts without an update take no part in LoRA products; use is assumed to be even.
    adapted = arch.num_active_experts * sum(step.adapted_experts) / arch.num_experts
    thin = adapted * step.expert_rank * (2 * arch.hidden + 3 * arch.expert_width)
    lora = 2 * (lora_parameters(arch, step)[0] + thin)
    layers = arch.num_layers * linear + lora
    again = layers + scores if step.checkpointing else 0.0
    return 2 * layers + lora + again + 2 * head + scores * (1 + ATTENTION_BACKWARD)


def estimate_time(arch: Arch, step: StepProfile, tflops: float = H100_TFLOPS) -> TimeEstimate:
    """Time of an optimiser step on `step.world_size` GPUs.

    Args:
        arch, step: the computation.
        tflops: the GPU's bfloat16 peak.
    """
    flops = flops_per_token(arch, step)
    per_rank = step.tokens * step.accumulation_steps
    fastest, slowest = (per_rank * flops / (share * tflops * 1e12) for share in reversed(EFFICIENCY))
    low, high = (f"{share:.0%}" for share in EFFICIENCY)
    basis = f"not measured: {flops / 1e9:.1f} GFLOP a token at {low} to {high} of {tflops:,.0f} TFLOP/s" + (
        " (H100, H200)" if tflops == H100_TFLOPS else ""
    )
    return TimeEstimate(flops, per_rank * step.world_size, fastest, slowest, basis)
