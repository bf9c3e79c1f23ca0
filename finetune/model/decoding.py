"""Decoding with a key-value cache: prompts are read packed, then each step computes one token per sequence.

Shape legend: B sequences, N tokens of all prompts joined, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune.kernels.attention import AttentionPlan, plan_attention
from finetune.kernels.cache import CachedAttention, KeyValueCache


class Decoder:
    """Reads prompts and then tokens, and keeps their keys and values.

    Args:
        model: a loaded base in evaluation mode, with or without an adapter.
        prompts: token ids of each; at least one token.
        num_new: tokens that may follow each prompt at most.
    """

    def __init__(self, model: GptOssForCausalLM, prompts: Sequence[Sequence[int]], num_new: int) -> None:
        self._model, self._prompts = model, prompts
        self._device = model.model.norm.weight.device
        config = model.config
        longest = max(map(len, prompts)) + num_new
        self._caches = {
            kind: KeyValueCache(
                [number for number, other in enumerate(config.layer_types) if other == kind],
                len(prompts),
                longest,
                config.sliding_window if kind == "sliding_attention" else None,
                config.num_key_value_heads,
                config.head_dim,
                model.model.norm.weight.dtype,
                self._device,
            )
            for kind in sorted(set(config.layer_types))
        }
        self._positions = torch.tensor([len(prompt) for prompt in prompts], device=self._device)

    @property
    def num_bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(cache.num_bytes for cache in self._caches.values())

    @torch.no_grad()
    def read_prompts(self) -> Tensor:
        """Read all prompts and return the final normed hidden state of each one's last token, [B, D]."""
        lengths = torch.tensor([len(prompt) for prompt in self._prompts])
        sequences = torch.repeat_interleave(lengths)
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        ids = torch.tensor([token for prompt in self._prompts for token in prompt])
        windows = {kind: cache.window for kind, cache in self._caches.items()}
        plans = {kind: plan_attention(sequences[None], positions[None], window) for kind, window in windows.items()}
        last = lengths.cumsum(0) - 1
        ids, sequences, positions = (tensor.to(self._device) for tensor in (ids, sequences, positions))
        plans = {kind: plan.to(self._device) for kind, plan in plans.items()}
        hidden = self._forward(ids, sequences, positions, plans)
        return hidden[0, last.to(self._device)]

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read the next token of each sequence, int64 [B], and return its final normed hidden state, [B, D]."""
        sequences = torch.arange(len(tokens), device=self._device)
        hidden = self._forward(tokens.to(self._device), sequences, self._positions, None)
        self._positions = self._positions + 1
        return hidden[:, 0]

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all sequences but these, in this order."""
        wanted = torch.tensor(sequences, device=self._device)
        self._positions = self._positions[wanted]
        for cache in self._caches.values():
            cache.keep(wanted)

    def _forward(
        self, ids: Tensor, sequences: Tensor, positions: Tensor, plans: dict[str, AttentionPlan] | None
    ) -> Tensor:
        """[1, N, D] for prompts joined in one packed sequence, [B, 1, D] for one token per sequence."""
        shape = (1, -1) if plans else (-1, 1)
        steps = {
            kind: CachedAttention(
                cache, sequences, positions, cache.reserve(sequences, positions), plans[kind] if plans else None
            )
            for kind, cache in self._caches.items()
        }
        output = self._model.model(
            input_ids=ids.view(shape),
            position_ids=positions.view(shape),
            attention_mask=steps,
            use_cache=False,
        )
        return output.last_hidden_state
