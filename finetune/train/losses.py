"""What a micro-step minimises: weighted token loss, and the router's balance.

Shape legend: B rows, S tokens in a row, T = B·S, D hidden, V vocabulary, N trained tokens, E experts, K active ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels.loss_head import token_nll
from finetune.model.router import Routing


def language_loss(hidden: Tensor, head: Tensor, where: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight x NLL over the trained tokens of a micro-step (not a mean: the step's total weight divides it).

    Args:
        hidden: [B, S, D], final normed hidden states.
        head: [V, D], frozen.
        where, targets, weights: see `finetune.model.predictions.predicted_tokens`.

    Returns:
        A float32 scalar in nats.
    """
    return (token_nll(hidden.flatten(0, 1)[where], head, targets) * weights).sum()


def balance_loss(layers: list[Routing], real_tokens: Tensor) -> Tensor:
    """Router load balance, mean over layers: E · sum_e f_e · P_e.

    P_e is the mean over real tokens of the float32 softmax over all E logits; f_e is the share of their T·K choices
    that fell on e, without gradient. It is 1 when f is uniform. transformers' `load_balancing_loss_func` is K times
    this and pools all layers first, so that opposite imbalances in two layers cancel.

    Args:
        layers: routing of each layer (logits [T, E], expert_ids [T, K]).
        real_tokens: bool [T], False on padding. With none at all the loss is 1 and has no gradient.
    """
    rows = real_tokens.nonzero()[:, 0]  # once for all layers: on a GPU this waits for the device
    if not len(rows):  # padding alone is balanced: it routes nothing
        return layers[0].logits.sum() * 0.0 + 1.0
    per_layer = []
    for routing in layers:
        logits, chosen = routing.logits[rows], routing.expert_ids[rows].reshape(-1)
        num_experts = logits.shape[1]
        ones = torch.ones(len(chosen), device=chosen.device)
        share = torch.zeros(num_experts, device=chosen.device).scatter_add_(0, chosen, ones) / len(chosen)
        probability = logits.float().softmax(-1).mean(0)
        per_layer.append(num_experts * (share * probability).sum())
    return torch.stack(per_layer).mean()
