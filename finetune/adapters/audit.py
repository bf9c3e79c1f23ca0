"""Gradient audit of the first two steps: every trained parameter has a gradient, and no frozen one has.

Each site's B (and a router trained in full) must have a gradient on step 1. Its A cannot (B = 0 makes A's exactly zero)
until an update has been made, so A is audited on the step after it. Experts that no trained token reached have none;
they are counted, not failed. A site whose experts all have none is an error.

The reason: failures are silent otherwise; NF4 experts under PEFT trained 3,584 of 44,544 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.adapters.lora import Adapter, ExpertLora, is_a, lora_parameters
from finetune.errors import CheckError
from finetune.kernels.dispatch import LoraRanks

GradientOf = Callable[[nn.Parameter], Tensor | None]


@dataclass(frozen=True)
class AuditResult:
    """The outcome of one audit.

    Attributes:
        factor: audited, `a` or `b`.
        sites: number of sites that passed.
        experts_reached: number of experts with a gradient, for each layer with adapted experts.
        experts_adapted: number of adapted experts of each of these layers.
    """

    factor: str
    sites: int
    experts_reached: tuple[int, ...]
    experts_adapted: tuple[int, ...]

    def describe(self) -> str:
        """One line, such as `gradients reach B of all 10 sites; experts reached by layer: 29-32 of 32`."""
        line = f"audit: gradients reach {self.factor.upper()} of all {self.sites} sites"
        if self.experts_reached:
            line += (
                f"; experts trained: yes, {len(self.experts_reached)} layers, {_span(self.experts_reached)} of "
                f"{_span(self.experts_adapted)} reached"
            )
        return line


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient that torch stores with a parameter."""
    return parameter.grad


def audit_gradients(
    model: nn.Module, adapter: Adapter, factor: str, *, gradient_of: GradientOf = local_gradient
) -> AuditResult:
    """Check the gradients of one step, before the update.

    Args:
        model: the whole model, after backward.
        adapter: its adapter.
        factor: `b` on the first step, `a` on the first step after an update.
        gradient_of: gives a parameter's whole gradient, where ranks store shards of it.

    Raises:
        CheckError: a site without gradient, or a frozen tensor with one.
    """
    touched = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    if touched:
        raise CheckError(f"frozen tensors have gradients: {', '.join(touched[:3])}")
    silent: list[str] = []
    reached: list[int] = []
    adapted: list[int] = []
    audited = 0
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        factors = {name: gradient_of(p) for name, p in lora_parameters(module).items() if is_a(name) == (factor == "a")}
        audited += bool(factors)
        silent += [f"{site.module}.{name}" for name, grad in factors.items() if not _any(grad)]
        gradients = [grad for grad in factors.values() if grad is not None]
        # A factor that all experts share does not tell which of them were reached.
        if site.kind == "experts" and len(gradients) == len(factors) and site.share != factor:
            by_expert = _experts_with_gradient(gradients, module.ranks if isinstance(module, ExpertLora) else None)
            reached.append(int(by_expert.sum()))
            adapted.append(len(by_expert))
    if silent and all(".mlp.router." in name for name in silent):
        raise CheckError(
            f"no gradient reaches {len(silent)} of the routers' factors: {', '.join(silent[:4])}",
            why="these routers are saturated: their softmax is exactly 0 or 1 for every token, as after a damaged or "
            "badly merged router weight",
            fix="use another base, or leave the router as it is: adapter.router.mode=frozen",
        )
    if silent:
        raise CheckError(
            f"no gradient reaches {len(silent)} of the adapter's factors: {', '.join(silent[:4])}",
            why="they would stay as they were initialised, and the adapter would look trained",
            fix="see that trainer.learning_rate, adam_eps and max_grad_norm do not make every update vanish; otherwise "
            "report this with the recipe",
        )
    return AuditResult(factor, audited, tuple(reached), tuple(adapted))


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _any(grad: Tensor | None) -> bool:
    return grad is not None and bool(torch.count_nonzero(grad))


def _experts_with_gradient(gradients: Sequence[Tensor], ranks: LoraRanks | None) -> Tensor:
    """Whether each expert has a non-zero gradient in every factor; factors [S, ...], or [N, ...] where ranks differ."""
    reached = torch.stack([g.flatten(1).count_nonzero(dim=1) > 0 for g in gradients])
    if ranks is not None:
        by_expert = torch.zeros(len(reached), len(ranks.of_expert), dtype=torch.int64, device=reached.device)
        reached = by_expert.index_add(1, ranks.expert.to(reached.device), reached.long()) > 0
    return reached.all(0)
