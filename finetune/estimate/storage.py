"""What a run takes outside the device: host memory while it runs, and disk."""

from __future__ import annotations

from finetune.config.schema import RunConfig
from finetune.estimate import parts as held
from finetune.estimate.inputs import StepShape
from finetune.estimate.parts import Part
from finetune.estimate.shapes import BaseFacts, BaseShape

HOST_PROCESS_BYTES = 3e9  # Python, torch and CUDA's libraries; an assumption until it is measured


def host_parts(base: BaseShape, step: StepShape) -> list[Part]:
    """Host memory of one process of a run on a GPU, at its largest."""
    count = sum(held.lora_parameters(base, step))
    states = count * held.state_bytes(step)
    table = base.vocab_size * base.hidden * 2
    blocks = base.num_experts * 2 * base.expert_width * base.hidden / 2
    kept = base.num_layers * step.tokens * base.hidden * step.compute_bytes
    parts = [
        Part("Python, torch, CUDA libraries", HOST_PROCESS_BYTES),
        Part("the largest tensor, while reading", max(table, blocks)),
        Part("a checkpoint, while saving", count * step.adapter_bytes + states),
        Part("input embedding", table if step.embedding_on_cpu else 0),
        Part("optimiser states", states if step.states_on_cpu or step.optimizer.startswith("paged") else 0),
        Part("activation checkpoints", kept if step.checkpointing and step.offload else 0),
    ]
    return [part for part in parts if part.num_bytes]


def disk_parts(facts: BaseFacts, config: RunConfig, step: StepShape) -> list[Part]:
    """Disk: the base, the run directory, and the exports that can be made of it."""
    base = facts.shape
    count = sum(held.lora_parameters(base, step))
    checkpoint = count * (step.adapter_bytes + held.state_bytes(step))
    # A new checkpoint is whole before an old one goes; the best one stays beside the newest.
    kept = config.save.keep + 1 + (config.save.best_metric != "none")
    here = facts.files_bytes is not None
    return [
        Part("base", facts.files_bytes or base.native_bytes, "here already" if here else "download"),
        Part("run directory", kept * checkpoint + count * step.adapter_bytes, f"up to {kept} checkpoints, the adapter"),
        Part("adapter", count * step.adapter_bytes, "part of the run directory"),
        Part("merged export, bf16", base.num_parameters * 2, "if you make one"),
        Part("merged export, mxfp4", base.native_bytes, "if you make one"),
    ]
