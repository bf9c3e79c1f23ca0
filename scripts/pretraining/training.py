"""The training loop of `scripts/pretrain_tiny.py`: a budget of processor time, checkpoints, and the compact result.

The learning rate rises over `WARMUP_STEPS`, stays, and falls to zero over the last `TAIL` of the budget, in which the
experts are rounded to MXFP4 in every forward pass (gradients pass straight through), so that rounding them in the end
costs nothing. Because only the tail depends on when it ends, an interrupted run may resume with another budget.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretraining.corpus import Conversations, Text, documents
from pretraining.network import build, corpus_nll
from pretraining.semantics import semantic_embeddings
from pretraining.vocabulary import Vocabulary
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune import log
from finetune.config.paths import shipped_dir
from finetune.data.batches import PADDING_SEGMENT, Batch, collate
from finetune.data.harmony.render import Example
from finetune.data.packing import pack
from finetune.model.forward import hidden_states, record_router, shift_labels
from finetune.model.tiny import HEAD_NOISE, CompactBase
from finetune.mxfp4.format import quantise
from finetune.objectives.router import balance_loss

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 8,
}
ROW_TOKENS = 2048
LEARNING_RATE, EMBEDDING_LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2, 0.05
WARMUP_STEPS, TAIL = 100, 0.25
BALANCE_COEFFICIENT = 0.01
SECONDS_BETWEEN_CHECKPOINTS = 120.0
_STATE, _PROGRESS = "state.safetensors", "progress.json"


@dataclass
class Place:
    """Progress of a run: sequences of `epoch` done, steps and processor seconds in all, and the recent loss."""

    epoch: int = 0
    row: int = 0
    steps: int = 0
    cpu_seconds: float = 0.0
    loss: float = float("nan")


class Pretraining:
    """A run.

    Args:
        directory: of the checkpoints; a run found there is resumed.
        texts: training texts.
        seed: of the weights and of the order.
    """

    def __init__(self, directory: Path, texts: list[Text], seed: int) -> None:
        self.directory, self.seed, self.place = directory, seed, Place()
        self.documents, self.conversations = documents(texts), Conversations(texts)
        self.vocabulary = Vocabulary.of(self.documents, self.conversations)
        published = shipped_dir("data") / "tokenizer" / "gpt-oss-20b" / "config.json"
        config = {**json.loads(published.read_text(encoding="utf-8")), **SIZES}
        self.model: GptOssForCausalLM = build(config, self.vocabulary.size, seed)
        # One matrix serves as embedding and, times this, as head.
        self.head_gain = torch.nn.Parameter(torch.tensor(0.5 * SIZES["hidden_size"] ** -0.5))
        self.optimizer = self._make_optimizer()
        if (directory / _PROGRESS).exists():
            self._load()
        else:
            self._start_from_company()

    @property
    def head(self) -> Tensor:
        """[C, D], with gradient."""
        return self.model.model.embed_tokens.weight * self.head_gain

    def train(self, budget_seconds: float) -> None:
        """Train until this much processor time was spent in all; checkpoints are written at intervals."""
        self.model.train()
        spent = self.place.cpu_seconds
        begun = time.process_time() if spent else 0.0  # preparing counts once
        saved = time.monotonic()
        with log.Progress("pretraining", round(budget_seconds), "CPU seconds") as progress:
            progress.start_at(round(spent))
            while (part := self.place.cpu_seconds / budget_seconds) < 1:
                batch = self._next_batch()
                self._step(batch, part)
                self.place.cpu_seconds = spent + time.process_time() - begun
                details = f"step {self.place.steps}, epoch {self.place.epoch}, loss {self.place.loss:.3f}"
                progress.show(min(round(self.place.cpu_seconds), progress.total or 0), details)
                if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def _next_batch(self) -> Batch:
        if self.place.row == 0:
            rng = np.random.default_rng([self.seed, self.place.epoch])
            self._samples = [*self.documents, *self.conversations.samples(rng)]
            self._rows = pack([len(sample.ids) for sample in self._samples], ROW_TOKENS, rng)
            rng.shuffle(self._rows)
        batch = collate([[self._samples[number] for number in self._rows[self.place.row]]])
        self.place.row += 1
        if self.place.row == len(self._rows):
            self.place.epoch, self.place.row = self.place.epoch + 1, 0
        return batch

    def _step(self, batch: Batch, part: float) -> None:
        rate = min(1.0, (self.place.steps + 1) / WARMUP_STEPS, (1 - part) / TAIL)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_rate"] * rate
        self.round_experts(part > 1 - TAIL)
        with record_router(self.model) as tape:
            hidden, targets, weights = self.predictions(batch)
        loss = corpus_nll(hidden, self.head, targets, weights, self.vocabulary.num_rest, noise()) / weights.sum()
        balance = balance_loss(tape.layers, batch.segments.flatten() != PADDING_SEGMENT)
        (loss + BALANCE_COEFFICIENT * balance).backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.place.steps += 1
        value = loss.item()
        if not np.isfinite(value):
            raise SystemExit(f"the loss is {value} at step {self.place.steps}")
        self.place.loss = value if self.place.steps == 1 else 0.98 * self.place.loss + 0.02 * value

    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, D] that predict trained tokens, these [N] as rows of the vocabulary, and their weights."""
        where, targets, weights = shift_labels(batch.input_ids, batch.weights, batch.segments)
        ids = self.vocabulary.number_of
        hidden = hidden_states(self.model, ids[batch.input_ids], batch.positions, batch.segments)
        return hidden.flatten(0, 1)[where], ids[targets], weights

    @torch.no_grad()
    def held_out_loss(self, samples: list[Example]) -> float:
        """Nats per trained token among all 201,088."""
        self.model.eval()
        total, count = 0.0, 0
        for row in pack([len(sample.ids) for sample in samples], ROW_TOKENS, np.random.default_rng(0)):
            hidden, targets, weights = self.predictions(collate([[samples[number] for number in row]]))
            same = torch.ones_like(weights)
            total += corpus_nll(hidden, self.head, targets, same, self.vocabulary.num_rest, noise()).item()
            count += len(targets)
        self.model.train()
        return total / count

    def round_experts(self, rounded: bool) -> None:
        """Whether experts are rounded to MXFP4 in the forward pass."""
        for layer in self.model.model.layers:
            layer.mlp.experts.rounded = rounded

    def compact(self) -> CompactBase:
        """The checkpoint's compact form."""
        rows = self.model.model.embed_tokens.weight.detach()
        others: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                continue
            if name.endswith((".gate_up_proj", ".down_proj")):
                others[f"{name}_blocks"], others[f"{name}_scales"] = quantise(tensor)
            else:
                others[name] = tensor.to(torch.bfloat16)
        tokens = torch.tensor(self.vocabulary.tokens)
        return CompactBase(SIZES, tokens, rows[:-1], rows[-1], self.head_gain.item(), others)

    def _start_from_company(self) -> None:
        """Begin with embeddings from which tokens occur together, the rest counted as one token."""
        number_of = self.vocabulary.number_of
        numbered = [number_of[torch.from_numpy(sample.ids).long()].tolist() for sample in self.documents]
        rows, embeddings = semantic_embeddings(numbered, SIZES["hidden_size"], self.seed)
        self.model.model.embed_tokens.weight.data[rows] = embeddings.float()

    def _make_optimizer(self) -> torch.optim.AdamW:
        self.model.lm_head.weight.requires_grad_(False)
        embedding = self.model.model.embed_tokens.weight
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad and p is not embedding]
        matrices = [p for name, p in named if p.ndim >= 2 and "bias" not in name]
        vectors = [self.head_gain, *(p for name, p in named if p.ndim < 2 or "bias" in name)]
        groups = [
            {"params": [embedding], "full_rate": EMBEDDING_LEARNING_RATE, "weight_decay": WEIGHT_DECAY / 3},
            {"params": matrices, "full_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "full_rate": LEARNING_RATE, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-9, fused=True)

    def _parameters(self) -> dict[str, Tensor]:
        return {"head_gain": self.head_gain, **{n: p for n, p in self.model.named_parameters() if p.requires_grad}}

    def save(self) -> None:
        """Write a checkpoint; the previous one is replaced once the new one is complete."""
        tensors = {}
        for name, parameter in self._parameters().items():
            tensors[f"value.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        staging = self.directory / f".{_STATE}.partial"
        progress = {"place": json.dumps(asdict(self.place)), "seed": str(self.seed)}
        save_file(tensors, staging, metadata=progress)
        os.replace(staging, self.directory / _STATE)
        (self.directory / _PROGRESS).write_text(json.dumps({**asdict(self.place), "seed": self.seed}, indent=2) + "\n")

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.directory / _STATE, framework="pt") as file:
            metadata = file.metadata()
        if int(metadata["seed"]) != self.seed:
            raise SystemExit(f"{self.directory} holds a run of seed {metadata['seed']}, not {self.seed}")
        tensors = load_file(self.directory / _STATE)
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[f"value.{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][key] = tensors[f"{key}.{name}"]
        self.place = Place(**json.loads(metadata["place"]))
        if self.place.row:  # the epoch's rows are made again, and those done are passed over
            row, self.place.row = self.place.row, 0
            self._next_batch()
            self.place.row = row
        log.info(f"going on from step {self.place.steps}, after {self.place.cpu_seconds:.0f} CPU seconds")


def noise() -> float:
    """Standard deviation of the rest's head noise."""
    return float(HEAD_NOISE / SIZES["hidden_size"])
