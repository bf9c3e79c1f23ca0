"""How long a step should take: its arithmetic divided by a stated share of what the GPU can do. Nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.estimate.inputs import StepShape
from finetune.estimate.parts import lora_parameters
from finetune.estimate.shapes import BaseShape

H100_TFLOPS = 989.0  # bfloat16, dense, H100 and H200 SXM (NVIDIA's data sheet)
EFFICIENCY = (0.2, 0.5)  # of the GPU's peak; the kernels' model (bench/README.md) says about 0.45 at 16k tokens
ATTENTION_BACKWARD = 2.5  # products of a backward pass over those of a forward pass


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds for an optimiser step, from fast to slow.

    Attributes:
        flops_per_token: arithmetic of a token's forward and backward, recomputation included.
        tokens_per_step: of all processes.
        fast_seconds, slow_seconds: for a step.
        basis: how they were worked out.
    """

    flops_per_token: float
    tokens_per_step: int
    fast_seconds: float
    slow_seconds: float
    basis: str


def flops_per_token(base: BaseShape, step: StepShape) -> float:
    """Multiplications and additions for one token, averaged over a sample of the longest length.

    The base is frozen, so its products have one gradient, not two: a backward pass costs what a forward pass does.
    """
    linear = 2 * (base.attention_weights + base.router + base.num_active_experts * base.expert_weights)
    head = 2 * base.vocab_size * base.hidden * step.trained_share
    seen = (step.longest_sample + 1) / 2
    sliding = base.num_layers - base.full_layers
    pairs = base.full_layers * seen + sliding * min(seen, base.sliding_window)
    scores = 4 * base.query_size * pairs
    # Rows that go to experts without an update take no part in thin products; use is taken to be even.
    rows = base.num_active_experts * sum(step.adapted_experts) / base.num_experts
    thin = rows * step.expert_rank * (2 * base.hidden + 3 * base.expert_width)
    lora = 2 * (lora_parameters(base, step)[0] + thin)
    layers = base.num_layers * linear + lora
    again = layers + scores if step.checkpointing else 0.0
    return 2 * layers + lora + again + 2 * head + scores * (1 + ATTENTION_BACKWARD)


def estimate_time(base: BaseShape, step: StepShape, tflops: float = H100_TFLOPS) -> TimeEstimate:
    """Time of an optimiser step on `step.processes` GPUs.

    Args:
        base, step: what is computed.
        tflops: the GPU's bfloat16 peak.
    """
    flops = flops_per_token(base, step)
    per_process = step.tokens * step.gradient_accumulation_steps
    fastest, slowest = (per_process * flops / (share * tflops * 1e12) for share in reversed(EFFICIENCY))
    low, high = (f"{share:.0%}" for share in EFFICIENCY)
    basis = f"not measured: {flops / 1e9:.1f} GFLOP a token at {low} to {high} of {tflops:,.0f} TFLOP/s" + (
        " (H100, H200)" if tflops == H100_TFLOPS else ""
    )
    return TimeEstimate(flops, per_process * step.processes, fastest, slowest, basis)
