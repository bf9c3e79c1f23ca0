"""Which positions of a batch predict a trained token: the shift by one, done in one place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def predicted_tokens(input_ids: Tensor, weights: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that predict a trained token, the token, and its weight.

    Args:
        input_ids: int64 [B, S].
        weights: float32 [B, S]: weight of predicting this token from what stands before it; 0 is context.
        segments: int64 [B, S], sample number in the row, -1 on padding.

    Returns:
        `where` int64 [N] into the flattened [B·S] hidden states, `targets` int64 [N], `target_weights` float32 [N].

    Raises:
        ValueError: a sample's first token is trained, though nothing of the sample stands before it.
    """
    same_sample = segments[:, 1:] == segments[:, :-1]
    next_weights = weights[:, 1:]
    if (next_weights * ~same_sample).any() or weights[:, 0].any():
        raise ValueError("the first token of a sample has a loss weight; there is nothing to predict it from")
    flat = F.pad(next_weights, (0, 1)).reshape(-1)
    where = flat.nonzero()[:, 0]
    targets = F.pad(input_ids[:, 1:], (0, 1)).reshape(-1)[where]
    return where, targets, flat[where]
