"""A real optimiser step on a small base on the CPU with every tensor's bytes counted: the reference for an estimate.

`tests/estimate/test_estimate_step.py` compares, `bench/estimate.py` prints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from allocation import AllocationTracker
from safetensors.torch import save_file

from finetune.adapters.attach import attach_adapter
from finetune.arch import Arch
from finetune.config.paths import shipped_dir
from finetune.config.schema import (
    AdapterConfig,
    AttentionAdapterConfig,
    DataConfig,
    ExpertAdapterConfig,
    ModelConfig,
    RunConfig,
    TrainerConfig,
)
from finetune.data.batches import Batch
from finetune.estimate.advice import with_overrides
from finetune.model.build import DTYPES, Base, build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import checkpoint_activations, hidden_states, record_router
from finetune.model.storage import BaseStorage
from finetune.train.engines.base import single_engine
from finetune.train.optim import PerParameterOptimizer, make_optimizer
from finetune.train.step import OptimiserStep

# Small vocabularies but one: with the published one the loss head is all that a small base's peak shows.
SIZES: dict[str, dict[str, Any]] = {
    "experts": {
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "head_dim": 48,
        "num_local_experts": 16,
        "vocab_size": 2048,
    },
    "attention": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "head_dim": 48,
        "num_local_experts": 16,
        "vocab_size": 2048,
    },
    "vocabulary": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "num_local_experts": 8,
        "vocab_size": 65_536,
    },
}


@dataclass(frozen=True)
class Measured:
    """Peak bytes of an optimiser step, and the routed tokens of the busiest chunk of experts over the average one's."""

    peak_bytes: int
    busiest_chunk: float


def write_base(directory: Path, name: str) -> Path:
    """A checkpoint of random weights in one of `SIZES`, without a tokenizer."""
    published = json.loads((shipped_dir("data") / "tokenizer" / "gpt-oss-20b" / "config.json").read_text())
    layers = SIZES[name]["num_hidden_layers"]
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2), "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1}
    config = published | SIZES[name] | kinds | ids
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for tensor, (dtype, shape) in Arch.from_config(config, "config.json").expected_tensors().items():
        if dtype == "U8":
            low, high = (118, 122) if tensor.endswith("_scales") else (0, 256)
            tensors[tensor] = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[tensor] = (torch.randn(shape, generator=generator) * 0.05).to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    return directory


def recipe(
    directory: Path,
    *,
    tokens: int = 512,
    sequences: int = 1,
    gradient_accumulation_steps: int = 1,
    chunk: int = 4,
    dtype: Any = "float32",
    ranks: tuple[int, int] = (4, 4),
    checkpointing: bool = True,
    options: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A recipe without data: ranks are of attention and of experts, options any other keys."""
    attention, experts = ranks
    config = RunConfig(
        model=ModelConfig(path=str(directory), experts_per_chunk=chunk, compute_dtype=dtype, device="cpu"),
        data=DataConfig(train={}, max_length=tokens),
        adapter=AdapterConfig(
            attention=AttentionAdapterConfig(rank=attention), experts=ExpertAdapterConfig(rank=experts)
        ),
        trainer=TrainerConfig(
            micro_batch_size=sequences,
            gradient_accumulation_steps=gradient_accumulation_steps,
            activation_checkpointing=checkpointing,
        ),
    )
    changed = with_overrides(config, options) if options else config
    assert changed is not None, options
    return changed


def full_batch(config: RunConfig, vocabulary: int, trained_share: float) -> Batch:
    """Rows of `max_length` random tokens, two samples in each."""
    sequences, length = config.trainer.micro_batch_size, config.data.max_length
    generator = torch.Generator().manual_seed(1)
    place = torch.arange(length)
    second = place >= length // 2
    positions = place - second * (length // 2)
    weights = (place * trained_share % 1 < trained_share).float().repeat(sequences, 1)
    weights[:, 0] = weights[:, length // 2] = 0
    return Batch(
        torch.randint(0, vocabulary, (sequences, length), generator=generator),
        weights,
        positions.repeat(sequences, 1),
        second.long().repeat(sequences, 1),
        tuple((f"r{row}a", f"r{row}b") for row in range(sequences)),
    )


def measure(directory: Path, config: RunConfig, trained_share: float = 1.0) -> Measured:
    """Peak of an optimiser step: weights and optimiser states allocated throughout, everything else as it comes."""
    dtype = DTYPES[config.model.compute_dtype]
    storage = BaseStorage.of(config.model)
    base = build_base(Checkpoint.open(directory), torch.device("cpu"), dtype, config.model.experts_per_chunk, storage)
    adapter = attach_adapter(base, config.adapter, seed=0)
    if config.trainer.activation_checkpointing:
        checkpoint_activations(base.model)
    parameters = adapter.parameters()
    optimizer = make_optimizer(parameters, config.trainer)
    step = OptimiserStep(config.trainer, base, single_engine(parameters, optimizer, config.trainer))
    batches = [
        full_batch(config, base.model.config.vocab_size, trained_share)
    ] * config.trainer.gradient_accumulation_steps
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter, dtype=DTYPES[config.trainer.gradient_dtype])
    optimizer.step()  # makes the optimiser's states
    optimizer.zero_grad(set_to_none=True)
    inner = [slot.inner for slot in optimizer.slots] if isinstance(optimizer, PerParameterOptimizer) else [optimizer]
    states = [value for one in inner for state in one.state.values() for value in state.values()]
    allocated = [*base.model.parameters(), *base.model.buffers(), *filter(torch.is_tensor, states)]
    # Without checkpointing the last layer's backward is the peak: activations are dropped from there on.
    busiest = busiest_chunks(base, batches[0])[0 if config.trainer.activation_checkpointing else -1 :]
    with AllocationTracker(allocated) as tracker:
        step(batches, 1e-4, 1)
    return Measured(tracker.peak_bytes, max(busiest))


@torch.no_grad()
def busiest_chunks(base: Base, batch: Batch) -> list[float]:
    """Routed tokens of the busiest chunk of experts over the average chunk's, layer by layer."""
    experts = base.model.model.layers[0].mlp.experts
    size, count = experts.experts_per_chunk, base.model.config.num_local_experts
    with record_router(base.model) as tape:
        hidden_states(base.model, batch.input_ids, batch.positions, batch.segments)
    shares = []
    for routing in tape.layers:
        tokens = torch.bincount(routing.expert_ids.reshape(-1), minlength=count)
        largest = max(float(part.sum()) for part in tokens.split(size))
        shares.append(largest / (routing.expert_ids.numel() * min(size, count) / count))
    return shares
