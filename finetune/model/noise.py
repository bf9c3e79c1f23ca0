"""Noise limits for two correct computations of one model, used by the product and by the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Perturbation in unit roundoffs of the dtype. float32 sums n products in an order that the machine chooses, with up to
# sqrt(n) of them as error; bfloat16 sums in float32 and rounds the result once.
PERTURBATION = {torch.float64: 32, torch.float32: 32, torch.bfloat16: 4, torch.float16: 4}
NUM_PERTURBED_RUNS = 2
_PERTURBED = {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp", "norm"}

Measure = Callable[[Tensor, Tensor], float]
"""(computed, reference) -> how far apart they are."""


def largest_difference(computed: Tensor, reference: Tensor) -> float:
    """Largest absolute difference of any two elements."""
    return (computed.float() - reference.float()).abs().max().item()


def mean_kl(computed: Tensor, reference: Tensor) -> float:
    """Mean KL(reference || computed) in nats of logits [..., V]."""
    log_p, log_q = reference.double().log_softmax(-1), computed.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def rounding_noise(
    model: nn.Module,
    compute: Callable[[], Tensor],
    measure: Measure = largest_difference,
    *,
    reference: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> float:
    """The largest difference between two correct computations that rounding explains; more than this is a fault.

    No absolute limit can tell: rounding grows with the scale of activations, with depth and with how sharply the model
    answers, and differs between instruction sets. An adapter that multiplies activations multiplies the noise too.

    Derivation. A matrix product, norm or attention in floating point is the exact result for inputs that are off by a
    few unit roundoffs u (backward error; u = 2^-24 in float32, 2^-8 in bfloat16): for a sum of n products up to about
    sqrt(n) u, in whatever order the machine adds. Two correct implementations of one model are therefore the same exact
    function with different perturbations of that size at every step, and how far their results lie apart is decided by
    how much the model itself amplifies them. That is measured here: `compute` runs again with Gaussian noise of
    PERTURBATION · u · (root mean square of the vector) added to every norm's, attention's and expert block's output,
    where all matrix products read their inputs. What the model does with it is the limit: through the residual stream,
    softmax and router as they are, including tokens near a tie that take another expert.

    The factor. On a tiny base, two correct float32 implementations (ours and stock PEFT on transformers) lay apart by
    0.05 to 0.09 of this limit without an adapter (up to 0.11 with SSE2 alone) and by 0.07 to 0.15 with 8 adapters that
    move logits by 16 to 20, at most 1.2e-4 in absolute terms. An update left out at any single site gave at least 460
    times the limit where B was 0.003, 4600 times where B was 0.3. `scripts/instruction_sets.py` measures with other
    processors' instructions.

    Args:
        model: whose modules are perturbed: transformers' gpt-oss, ours, or either under PEFT.
        compute: runs `model` and gives logits, hidden states, or a gradient. Called NUM_PERTURBED_RUNS times, on every
            process in the same way where processes hold parts of the model.
        measure: how results are compared.
        reference: what `compute` gives without noise. None: it is called once more.
        precision: whose unit roundoff the noise has. None: of the activations. bfloat16 over float32 activations is the
            noise of weights that are rounded to bfloat16: each product is off by at most one u, 4 u are added.
    """
    reference = compute() if reference is None else reference
    found = []
    for seed in range(NUM_PERTURBED_RUNS):
        with _perturbed(model, seed, precision):
            found.append(measure(compute(), reference))
    return max(found)


@contextmanager
def _perturbed(model: nn.Module, seed: int, precision: torch.dtype | None) -> Iterator[None]:
    """Inside, the modules named above give outputs that are off by rounding's size."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every process and device

    def perturb(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        scale = x.detach().float().square().mean(-1, keepdim=True).sqrt()
        dtype = precision or x.dtype
        size = PERTURBATION[dtype] * torch.finfo(dtype).eps / 2
        noise = torch.randn(x.shape, generator=generator).to(x.device) * scale * size
        moved = x + noise.to(x.dtype)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _PERTURBED]
    if not modules:
        raise ValueError("no layer of this model is known by name, so nothing would be perturbed")
    handles = [module.register_forward_hook(perturb) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
