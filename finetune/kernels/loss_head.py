"""Loss head: negative log-likelihood over 201,088 logits, in chunks, never a whole [N, V] tensor.

Context tokens are dropped before the head: only positions whose next token is trained are passed in. The head is
frozen, so its weight gets no gradient. Logits are float32 straight from the product: rounded to bfloat16 on the way, as
a plain `hidden @ head.T` does, a logit of 20 would be off by up to 0.06.

torch 2.13's own `linear_cross_entropy` is not used: with a loss for each token it computes the logits twice, and on a
CPU it uses small chunks and takes several times as long (`bench/loss_head.py`).

Shape legend: N predicted tokens, M hidden states, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS_PER_CHUNK = 512  # 512 x 201,088 float32 logits are 0.41 GB
_WORDS_PER_SLICE = 16_384  # of the head, made float32 at a time on a CPU


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor, tokens_per_chunk: int = TOKENS_PER_CHUNK) -> Tensor:
    """-log softmax(hidden @ head.T)[target], chunk by chunk.

    Args:
        hidden: [N, D], the final normed hidden states that predict the targets.
        head: [V, D], frozen, in hidden's dtype.
        targets: int64 [N].

    Returns:
        float32 [N] in nats (float64 for float64 inputs); gradients reach `hidden` only.
    """
    return _TokenNll.apply(hidden, head, targets, tokens_per_chunk)


def answer_scores(hidden: Tensor, head: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(hidden[positions] @ head.T)[targets], without gradient, where many targets share a hidden state.

    Args:
        hidden: [M, D].
        head: [V, D].
        positions: int64 [N], indices into hidden.
        targets: int64 [N].

    Returns:
        float32 [N] in nats, and bool [N], whether no token is likelier than the target.
    """
    result = hidden.new_empty(len(positions), dtype=torch.float32)
    is_likeliest = torch.zeros(len(positions), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(hidden), TOKENS_PER_CHUNK):
        logits = _logits(hidden[start : start + TOKENS_PER_CHUNK], head)
        here = (positions >= start) & (positions < start + TOKENS_PER_CHUNK)
        picked = positions[here] - start
        wanted = logits[picked, targets[here]]
        is_likeliest[here] = wanted == logits.amax(-1)[picked]
        _, log_total = _exponentials(logits)
        result[here] = wanted - log_total[picked]
        del logits  # or the next chunk's would be allocated beside them
    return result, is_likeliest


def token_kl(reference: Tensor, hidden: Tensor, head: Tensor, tokens_per_chunk: int = 128) -> Tensor:
    """KL(reference || other) between the next-token distributions of two hidden states under one head.

    Args:
        reference, hidden: [N, D], of the same tokens.
        head: [V, D].
        tokens_per_chunk: 128 x 201,088 float32 logits are 0.1 GB, and four such tensors are alive at a time.

    Returns:
        float32 [N] in nats, without gradient.
    """
    parts = []
    for start in range(0, len(hidden), tokens_per_chunk):
        span = slice(start, start + tokens_per_chunk)
        wanted, found = (_logits(states[span], head).log_softmax(-1) for states in (reference, hidden))
        parts.append((wanted.exp() * (wanted - found)).sum(-1))
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.float32)


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """[N, D] x [V, D] -> [N, V] in float32 (float64 for float64), not rounded in bfloat16 on the way."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ head.T
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    logits = hidden.new_empty(len(hidden), len(head), dtype=torch.float32)
    for start in range(0, len(head), _WORDS_PER_SLICE):
        span = slice(start, start + _WORDS_PER_SLICE)
        logits[:, span] = hidden.float() @ head[span].float().T
    return logits


def _hidden_grad(logit_grads: Tensor, head: Tensor) -> Tensor:
    """[N, V] x [V, D] -> [N, D] in the first one's dtype; the factors are rounded to the head's dtype."""
    if logit_grads.dtype != head.dtype and head.is_cuda:
        return torch.mm(logit_grads.to(head.dtype), head, out_dtype=logit_grads.dtype)
    return (logit_grads.to(head.dtype) @ head).to(logit_grads.dtype)


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute exp(logits - largest) in place, and log-sum-exp of the logits [N].

    One pass of exp over V, where logsumexp and a following softmax would take two.
    """
    largest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    return exponentials, (exponentials.sum(-1, keepdim=True).log() + largest)[:, 0]


class _TokenNll(torch.autograd.Function):
    """Computes the gradient in the forward pass, while the logits are in memory.

    The gradient of each token's NLL is a row of its own, which the backward pass only has to scale.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, tokens_per_chunk):  # type: ignore[no-untyped-def]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        nll = hidden.new_empty(len(hidden), dtype=exact)
        unit_grad = torch.empty_like(hidden, dtype=exact) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), tokens_per_chunk):
            span = slice(start, start + tokens_per_chunk)
            logits = _logits(hidden[span], head)
            wanted = logits.gather(1, targets[span, None])[:, 0]
            exponentials, log_total = _exponentials(logits)
            nll[span] = log_total - wanted
            if unit_grad is not None:
                probabilities = exponentials.div_(exponentials.sum(-1, keepdim=True))
                probabilities[torch.arange(len(probabilities), device=logits.device), targets[span]] -= 1
                unit_grad[span] = _hidden_grad(probabilities, head)
                del probabilities
            del logits, exponentials  # or the next chunk's would be allocated beside them
        ctx.save_for_backward(unit_grad)
        ctx.hidden_dtype = hidden.dtype
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll):  # type: ignore[no-untyped-def]
        (unit_grad,) = ctx.saved_tensors
        return (unit_grad * grad_nll[:, None]).to(ctx.hidden_dtype), None, None, None
