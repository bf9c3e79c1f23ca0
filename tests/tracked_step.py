"""A real optimiser step on a small base on the CPU, with every tensor's bytes counted: what an estimate is held to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from allocation import AllocationTracker
from safetensors.torch import save_file

from finetune.adapters.lora import attach_adapter
from finetune.config.locate import shipped_dir
from finetune.config.schema import RunConfig
from finetune.data.batches import Batch
from finetune.model.build import DTYPES, Base, load_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import checkpoint_activations, hidden_states
from finetune.model.router import record_routing
from finetune.model.shapes import ModelShape
from finetune.train.step import OptimiserStep, make_optimizer

# A small vocabulary: with the published one the loss head is all that the tiny base's peak shows.
SMALL_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "num_local_experts": 16,
    "vocab_size": 2048,
    "pad_token_id": 0,
}


class PeakTracker(AllocationTracker):
    """Counts as its base does, and remembers what was alive at the peak.

    Attributes:
        at_peak: bytes alive at the peak by the operation that made them and their shape; `held` before the block.
    """

    def __init__(self, held: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._owner: dict[int, str] = {}
        self.at_peak: Counter[str] = Counter()
        self._label = "held"
        for name, tensor in held.items():
            self._label = f"held {name}"
            self._add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._label = str(func)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._owner[storage._cdata] = f"{self._label} {storage.nbytes()}"
        before = self.peak_bytes
        super()._add(storage)
        if self.peak_bytes > before:
            self._peak_keys = None
            self._snapshot = dict(self._owner) if DETAIL else {}

    def _remove(self, key: int, size: int) -> None:
        self._owner.pop(key, None)
        super()._remove(key, size)


DETAIL = False


def write_base(directory: Path, sizes: Mapping[str, Any]) -> Path:
    """A checkpoint of random weights with other sizes than the tiny base's, without a tokenizer."""
    published = json.loads((shipped_dir("data") / "tokenizer" / "gpt-oss-20b" / "config.json").read_text())
    config = published | dict(sizes)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (dtype, shape) in ModelShape.from_config(config, "config.json").expected_tensors().items():
        if dtype == "U8":
            low, high = (118, 122) if name.endswith("_scales") else (0, 256)
            tensors[name] = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = (torch.randn(shape, generator=generator) * 0.05).to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    return directory


def random_batch(config: RunConfig, vocab: int, trained_share: float) -> Batch:
    """Full rows of `max_length` tokens, two samples in each."""
    rows, length = config.trainer.rows_per_micro_step, config.data.max_length
    generator = torch.Generator().manual_seed(1)
    half = torch.arange(length) >= length // 2
    positions = torch.where(half, torch.arange(length) - length // 2, torch.arange(length))
    weights = (torch.rand(rows, length, generator=generator) < trained_share).float()
    weights[:, 0] = weights[:, length // 2] = 0
    return Batch(
        torch.randint(0, vocab, (rows, length), generator=generator),
        weights,
        positions.repeat(rows, 1),
        half.long().repeat(rows, 1),
        tuple((f"r{row}a", f"r{row}b") for row in range(rows)),
    )


@dataclass(frozen=True)
class Measured:
    """Bytes alive at the most during the second optimiser step, and what they were."""

    peak_bytes: int
    busiest: float
    snapshot: dict[int, str]


def measure(directory: Path, config: RunConfig, trained_share: float = 1.0) -> Measured:
    """Peak of tracked bytes over two optimiser steps: weights and optimiser states held, everything else as it comes."""
    dtype = DTYPES.get(config.model.compute_dtype, torch.float32)
    base = load_base(Checkpoint.open(directory), torch.device("cpu"), dtype, config.model.experts_per_chunk)
    adapter = attach_adapter(base, config.adapter, seed=0)
    if config.trainer.activation_checkpointing:
        checkpoint_activations(base.model)
    parameters = adapter.parameters()
    optimizer = make_optimizer(parameters, config.trainer)
    step = OptimiserStep(config.trainer, base, parameters, optimizer, Accelerator(cpu=True))
    batches = [random_batch(config, base.model.config.vocab_size, trained_share)] * config.trainer.micro_steps
    step(batches, 1e-4, 1)  # makes the optimiser's states
    held = dict(base.model.named_parameters()) | dict(base.model.named_buffers())
    for name, parameter in parameters.items():
        held |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    # Without checkpointing the last layer's backward is the peak, since activations are dropped from there on.
    busiest = busiest_chunk(base, batches[0])[0 if config.trainer.activation_checkpointing else -1 :]
    with PeakTracker(held) as tracker:
        step(batches, 1e-4, 2)
    return Measured(tracker.peak_bytes, max(busiest), getattr(tracker, "_snapshot", {}))


@torch.no_grad()
def busiest_chunk(base: Base, batch: Batch) -> list[float]:
    """Rows of the busiest chunk of experts over the average chunk's, layer by layer."""
    experts = base.model.model.layers[0].mlp.experts
    size, count = experts.experts_per_chunk, len(experts.gate_up_proj_blocks)
    with record_routing(base.model) as tape:
        hidden_states(base.model, batch.input_ids, batch.positions, batch.segments)
    shares = []
    for routing in tape.layers:
        rows = torch.bincount(routing.expert_ids.reshape(-1), minlength=count)
        largest = max(float(part.sum()) for part in rows.split(size))
        shares.append(largest / (routing.expert_ids.numel() * min(size, count) / count))
    return shares
