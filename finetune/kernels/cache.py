"""Key-value cache of generation: keys and values of earlier tokens, and attention of new tokens over them.

Sequences of different lengths are cached side by side, without padding among their keys: an empty slot is masked. A
layer with a sliding window keeps only its window, as a ring buffer.

Shape legend: B sequences, C slots, N tokens of all sequences joined, H query heads, J key heads, G = H / J, d head
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.kernels.attention import Attention, AttentionPlan

_EMPTY = -1


class KeyValueCache:
    """Keys and values of one kind of layer (full or sliding).

    Args:
        layers: numbers of the layers of this kind.
        sequences: B.
        longest: most tokens that a sequence may have, prompt included.
        window: keys that a query of these layers attends to, itself included; None for all.
        key_heads, width: J and d.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        layers: list[int],
        sequences: int,
        longest: int,
        window: int | None,
        key_heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window = window
        slots = longest if window is None else min(window, longest)
        shape = (len(layers), sequences, slots, key_heads, width)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._positions = torch.full((sequences, slots), _EMPTY, device=device)  # of the token in each slot
        self._number = {layer: number for number, layer in enumerate(layers)}

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self._keys.numel() * self._keys.element_size()

    def reserve(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """Assign slots to the next tokens, once for all layers of the kind.

        Args:
            sequences: int64 [N], which sequence each token belongs to.
            positions: int64 [N], position of each token there. Every sequence has at least one token.

        Returns:
            int64 [N'], numbers of the tokens that are cached: in a window's ring not the early ones of a long prompt.
        """
        slots = self._positions.shape[1]
        if len(positions) == len(
            self._positions
        ):  # one each: the usual step, which must not synchronise with the device
            self._positions[sequences, positions % slots] = positions
            return torch.arange(len(positions), device=positions.device)
        newest = torch.full_like(self._positions[:, 0], _EMPTY).scatter_reduce(0, sequences, positions, "amax")
        kept = (positions > newest[sequences] - slots).nonzero()[:, 0]
        self._positions[sequences[kept], positions[kept] % slots] = positions[kept]
        return kept

    def write(self, layer: int, sequences: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [N, J, d] of tokens for which `reserve` has assigned slots."""
        number, slots = self._number[layer], positions % self._positions.shape[1]
        self._keys[number, sequences, slots] = keys
        self._values[number, sequences, slots] = values

    def attend(self, layer: int, q: Tensor, positions: Tensor, sinks: Tensor, scaling: float) -> Tensor:
        """Attention of each sequence's newest token over the cached tokens of its sequence, itself included.

        Args:
            layer: number of the layer.
            q: [B, H, d].
            positions: int64 [B].
            sinks: [H] logits.
            scaling: factor on the scores.

        Returns:
            [B, H, d] in q's dtype; scores and probabilities are float32 (float64 for float64).
        """
        keys, values = self._keys[self._number[layer]], self._values[self._number[layer]]
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        grouped = q.view(len(q), keys.shape[2], -1, q.shape[2]).to(exact) * scaling  # [B, J, G, d]
        scores = torch.einsum("bjgd,bcjd->bjgc", grouped, keys.to(exact))
        masked = (self._positions == _EMPTY) | (self._positions > positions[:, None])
        if self.window is not None:
            masked = masked | (self._positions <= positions[:, None] - self.window)
        scores = scores.masked_fill(masked[:, None, None], float("-inf"))
        sink = sinks.to(exact).view(1, *grouped.shape[1:3], 1).expand(len(q), -1, -1, -1)
        probabilities = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        return torch.einsum("bjgc,bcjd->bjgd", probabilities, values.to(exact)).reshape(q.shape).to(q.dtype)

    def keep(self, sequences: Tensor) -> None:
        """Drop all sequences but these (int64 [B'], in the new order)."""
        self._keys, self._values = self._keys[:, sequences], self._values[:, sequences]
        self._positions = self._positions[sequences]


@dataclass(frozen=True)
class CachedAttention:
    """Attention of one forward pass over new tokens in one kind of layer, in place of the plan of training.

    Attributes:
        cache: of earlier tokens; the new ones are added.
        sequences, positions: int64 [N], of the new tokens.
        kept: int64 [N'], see `KeyValueCache.reserve`.
        plan: for whole prompts, packed into one sequence. None: one new token per sequence.
    """

    cache: KeyValueCache
    sequences: Tensor
    positions: Tensor
    kept: Tensor
    plan: AttentionPlan | None

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """[N, H, d], [N, J, d], [N, J, d] -> [N, H, d]; whole prompts are computed by `attention`."""
        kept = self.kept
        self.cache.write(layer, self.sequences[kept], self.positions[kept], k[kept], v[kept])
        if self.plan is not None:
            return attention(q, k, v, sinks, self.plan, scaling)
        return self.cache.attend(layer, q, self.positions, sinks, scaling)
