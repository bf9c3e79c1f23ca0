"""From a recipe to the few settings that decide how much memory a step takes: one function, one line a key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.config.expert_selection import highest_rank, parse_select, read_expert_scores
from finetune.config.schema import RunConfig
from finetune.estimate.shapes import BaseShape

# Rows of the busiest chunk over the average chunk's: 1 + this / sqrt(experts in a chunk), since popular experts even
# out among many. A guess until a run on a real base measures it; bench/estimate.py prints what it finds.
CROWDING = 1.5


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What one micro-step computes, and with which settings that cost or save memory.

    Attributes:
        on_gpu: estimated for a GPU; else for the reference path on a CPU.
        rows, row_tokens: packed rows in a micro-step, and tokens in a row.
        longest_sample: tokens in the longest sample of a row; attention cares.
        gradient_accumulation_steps: micro-steps of an optimiser step; with several, gradients exist from the first on.
        trained_share: share of the tokens that is trained; the loss head cares.
        busiest_chunk: rows of the busiest chunk of experts over the average chunk's.
        compute_bytes: of an activation, and of every weight that is not packed.
        expert_storage, attention_storage, embedding_on_cpu: how and where the base is held.
        experts_per_chunk: experts dequantised at a time.
        expert_kernel, attention_kernel: `triton` and `flash`; `reference` is plain PyTorch.
        attention_rank, attention_targets, expert_rank, adapted_layers: the adapter's sites; experts' ranks may differ,
            and are then this on average.
        adapted_experts: in each adapted layer.
        highest_rank: of an expert.
        shared_factor: which factor a layer's experts have in common: `a`, `b` or `none`.
        router_parameters: trained ones of one layer's router.
        adapter_bytes, gradient_bytes: of a LoRA parameter and of its gradient.
        optimizer, states_on_cpu: which optimiser, and where its states are.
        checkpointing, offload: layers recomputed in the backward pass; their inputs kept in host memory.
        kind, processes: of distributed training.
    """

    on_gpu: bool
    rows: int
    row_tokens: int
    longest_sample: int
    gradient_accumulation_steps: int
    trained_share: float = 1.0
    busiest_chunk: float
    compute_bytes: Literal[2, 4]
    expert_storage: str
    attention_storage: str
    embedding_on_cpu: bool
    experts_per_chunk: int
    expert_kernel: str
    attention_kernel: str
    attention_rank: int
    attention_targets: tuple[str, ...]
    expert_rank: int
    adapted_layers: int
    adapted_experts: tuple[int, ...]
    highest_rank: int
    shared_factor: str
    router_parameters: int
    adapter_bytes: Literal[2, 4]
    gradient_bytes: Literal[2, 4]
    optimizer: str
    states_on_cpu: bool
    checkpointing: bool
    offload: bool
    kind: str
    processes: int

    @property
    def tokens(self) -> int:
        """Tokens in a micro-step, padding included."""
        return self.rows * self.row_tokens


def step_shape(config: RunConfig, base: BaseShape, *, on_gpu: bool) -> StepShape:
    """Take from a recipe what its memory follows from.

    Args:
        config: the checked recipe.
        base: for what a recipe leaves open (all layers, all experts).
        on_gpu: whether it will run on one.
    """
    first, last = config.adapter.layers or (0, base.num_layers - 1)
    dtype = config.model.compute_dtype
    return StepShape(
        on_gpu=on_gpu,
        rows=config.trainer.micro_batch_size,
        row_tokens=config.data.max_length,
        longest_sample=config.data.max_length,
        gradient_accumulation_steps=config.trainer.gradient_accumulation_steps,
        busiest_chunk=1 + CROWDING / math.sqrt(config.model.experts_per_chunk),
        compute_bytes=4 if dtype == "float32" or (dtype == "auto" and not on_gpu) else 2,
        expert_storage=config.model.expert_storage,
        attention_storage=config.model.attention_storage,
        embedding_on_cpu=config.model.embedding_on_cpu,
        experts_per_chunk=min(config.model.experts_per_chunk, base.num_experts),
        expert_kernel=_kernel(config.model.expert_kernel, "triton" if on_gpu else "reference"),
        attention_kernel=_kernel(config.model.attention_kernel, "flash"),
        attention_rank=config.adapter.attention.rank,
        attention_targets=config.adapter.attention.targets,
        expert_rank=config.adapter.experts.rank,
        adapted_layers=max(0, min(last, base.num_layers - 1) - first + 1),
        adapted_experts=_adapted_experts(config.adapter.experts.select, base, first, last),
        highest_rank=highest_rank(config.adapter.experts),
        shared_factor=config.adapter.experts.share,
        router_parameters=_router_parameters(config, base),
        adapter_bytes=2 if config.adapter.dtype == "bfloat16" else 4,
        gradient_bytes=2 if config.trainer.gradient_dtype == "bfloat16" else 4,
        optimizer=config.trainer.optimizer,
        states_on_cpu=config.trainer.optimizer_states_on_cpu,
        checkpointing=config.trainer.activation_checkpointing,
        offload=config.trainer.activation_offload,
        kind=config.distributed.kind,
        processes=config.distributed.num_processes,
    )


def _kernel(chosen: str, automatic: str) -> str:
    """What `auto` comes to."""
    return automatic if chosen == "auto" else chosen


def _router_parameters(config: RunConfig, base: BaseShape) -> int:
    router = config.adapter.router
    return {"lora": router.rank * (base.hidden + base.num_experts), "full": base.router}.get(router.mode, 0)


def _adapted_experts(select: str, base: BaseShape, first: int, last: int) -> tuple[int, ...]:
    """Experts of each adapted layer; how many a share of the use comes to is not known here, so all of them.

    Raises:
        ConfigError, InputError: `select` names a file that is not there, or another one than it should.
    """
    layers = range(first, min(last, base.num_layers - 1) + 1)
    rule = parse_select(select)
    if rule.kind == "file":
        selected = read_expert_scores(Path(rule.path).expanduser()).selected
        return tuple(len(selected.get(layer, ())) for layer in layers)
    count = min(rule.top_k, base.num_experts) if rule.kind == "top_k" else base.num_experts
    return (count,) * len(layers)
