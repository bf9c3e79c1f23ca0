"""Is everything training that should, and nothing else? Answered from gradients, once, in the first two steps.

Each site's B must have a gradient on step 1. Its A cannot (B = 0 makes A's exactly zero) until an update has been made,
so A is audited on the step after it. Experts that no trained token reached have none, and that is counted, not failed;
a site whose experts all have none is a fault.

Source of the rule: facts about silent failures, e.g. NF4 experts under PEFT trained 3,584 of 44,544 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.adapters.lora import Adapter, lora_parameters
from finetune.errors import CheckError

GradientOf = Callable[[nn.Parameter], Tensor | None]


@dataclass(frozen=True)
class AuditResult:
    """What one audit found.

    Attributes:
        factor: which factors were audited, `a` or `b`.
        sites: how many sites passed.
        experts_reached: for each layer with adapted experts, how many experts had a gradient.
        num_experts: experts in a layer.
    """

    factor: str
    sites: int
    experts_reached: tuple[int, ...]
    num_experts: int

    def describe(self) -> str:
        """One line, such as `gradients reach B of all 10 sites; experts reached by layer: 29-32 of 32`."""
        line = f"audit: gradients reach {self.factor.upper()} of all {self.sites} sites"
        if self.experts_reached:
            low, high = min(self.experts_reached), max(self.experts_reached)
            count = f"{low}" if low == high else f"{low} to {high}"
            line += f"; experts trained: yes, {len(self.experts_reached)} layers, {count} of {self.num_experts} reached"
        return line


def own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient as torch keeps it."""
    return parameter.grad


def audit_gradients(
    model: nn.Module, adapter: Adapter, factor: str, *, gradient_of: GradientOf = own_gradient
) -> AuditResult:
    """Check the gradients of one step, before the update.

    Args:
        model: the whole model, after backward.
        adapter: its adapter.
        factor: `b` on the first step, `a` on the first step after an update.
        gradient_of: gives a parameter's whole gradient, where processes hold parts of it.

    Raises:
        CheckError: a site without gradient, or a frozen tensor with one.
    """
    touched = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    if touched:
        raise CheckError(f"frozen tensors have gradients: {', '.join(touched[:3])}")
    silent: list[str] = []
    reached: list[int] = []
    num_experts = 0
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        factors = {name: gradient_of(p) for name, p in lora_parameters(module).items() if name.endswith(factor)}
        silent += [f"{site.module}.{name}" for name, grad in factors.items() if not _any(grad)]
        if site.kind == "experts" and all(grad is not None for grad in factors.values()):
            with_gradient = _experts_with_gradient([g for g in factors.values() if g is not None])
            reached.append(with_gradient)
            num_experts = len(next(iter(factors.values())))  # type: ignore[arg-type]
    if silent:
        raise CheckError(
            f"no gradient reaches {len(silent)} of the adapter's factors: {', '.join(silent[:4])}",
            why="they would stay as they were initialised, and the adapter would look trained",
            fix="please report this with the recipe",
        )
    return AuditResult(factor, len(adapter.sites), tuple(reached), num_experts)


def _any(grad: Tensor | None) -> bool:
    return grad is not None and bool(torch.count_nonzero(grad))


def _experts_with_gradient(gradients: Sequence[Tensor]) -> int:
    """Experts whose every factor has a non-zero gradient; factors [E, ...]."""
    reached = torch.stack([g.flatten(1).count_nonzero(dim=1) > 0 for g in gradients])
    return int(reached.all(0).sum())
