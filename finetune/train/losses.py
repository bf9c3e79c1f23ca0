"""What a micro-step minimises: weighted token loss, and the terms on the router.

Shape legend: B rows, S tokens in a row, T = B·S, D hidden, V vocabulary, N trained tokens, E experts, K active ones.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def choice_counts(layers: Sequence[Routing], rows: Tensor) -> Tensor:
    """How often each expert was chosen: float64 [layers, E], without gradient.

    Args:
        layers: routing of each layer.
        rows: int64 [N], the tokens that are not padding.
    """
    num_experts = layers[0].logits.shape[1]
    chosen = torch.stack([routing.expert_ids[rows].reshape(-1) for routing in layers])
    counts = torch.zeros(len(layers), num_experts, dtype=torch.float64, device=chosen.device)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))


def balance_weights(chosen: Tensor, base_chosen: Tensor | None = None) -> Tensor:
    """What each expert's mean probability is multiplied by in the balance loss: [..., E], without gradient.

    Against uniform use E · f_e, with f_e the share of the choices that fell on e. Against the base's use
    (n_e + 1) / (m_e + 1), with n_e and m_e the choices of e now and by the base on the same tokens: f_e / q_e, with
    one more choice of each so that an expert the base left out has a finite weight. Either way all weights are 1 when
    use is as wanted, and the loss is then 1 and has no gradient.

    Args:
        chosen: counts [..., E].
        base_chosen: the base's counts for the same tokens. None: the target is uniform.
    """
    if base_chosen is not None:
        return (chosen + 1) / (base_chosen + 1)
    return chosen.shape[-1] * chosen / chosen.sum(-1, keepdim=True).clamp(min=1)


def balance_sum(layers: Sequence[Routing], rows: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of sum_e weight_e · p_e, mean over layers: a micro-step's share of the loss times all its tokens.

    Args:
        layers: routing of each layer; p is the float32 softmax over all E logits (float64 for float64 logits).
        rows: int64 [N], the tokens that are not padding.
        weights: [layers, E] of `balance_weights`.
    """
    per_layer = []
    for routing, weight in zip(layers, weights, strict=True):
        logits = _exact(routing.logits[rows])
        per_layer.append((logits.softmax(-1).sum(0) * weight.to(logits.dtype)).sum())
    return torch.stack(per_layer).mean()


def z_sum(layers: Sequence[Routing], rows: Tensor) -> Tensor:
    """Sum over tokens of the squared log-sum-exp of the router's logits, mean over layers (Zoph et al. 2022)."""
    return torch.stack([_exact(routing.logits[rows]).logsumexp(-1).square().sum() for routing in layers]).mean()


def balance_loss(layers: Sequence[Routing], real_tokens: Tensor) -> Tensor:
    """Router load balance of one micro-step by itself, mean over layers: E · sum_e f_e · P_e.

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
    return balance_sum(layers, rows, balance_weights(choice_counts(layers, rows))) / len(rows)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
