"""What a micro-step minimises: weighted token loss, and the terms on the router.

Shape legend: B rows, S tokens in a row, T = B·S, D hidden, V vocabulary, N trained tokens, E experts, K active ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.adapters.lora import Adapter
from finetune.adapters.sites import Site
from finetune.arch import Arch
from finetune.config.schema import TrainerConfig
from finetune.data.batches import PADDING_SEGMENT, Batch
from finetune.kernels.loss_head import token_nll
from finetune.model.build import Base
from finetune.model.forward import RouterOutput, hidden_states, record_router
from finetune.model.usage import UsageCounter


def language_loss(hidden: Tensor, head: Tensor, where: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight x NLL over the trained tokens of a micro-step (not a mean: the step's total weight divides it).

    Args:
        hidden: [B, S, D], final normed hidden states.
        head: [V, D], frozen.
        where, targets, weights: see `finetune.model.forward.shift_labels`.

    Returns:
        A float32 scalar in nats.
    """
    return (token_nll(hidden.flatten(0, 1)[where], head, targets) * weights).sum()


def choice_counts(layers: Sequence[RouterOutput], rows: Tensor) -> Tensor:
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


def balance_sum(layers: Sequence[RouterOutput], rows: Tensor, weights: Tensor) -> Tensor:
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


def z_sum(layers: Sequence[RouterOutput], rows: Tensor) -> Tensor:
    """Sum over tokens of the squared log-sum-exp of the router's logits, mean over layers (Zoph et al. 2022)."""
    return torch.stack([_exact(routing.logits[rows]).logsumexp(-1).square().sum() for routing in layers]).mean()


def balance_loss(layers: Sequence[RouterOutput], real_tokens: Tensor) -> Tensor:
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


# The terms on the router that a step adds to the language loss: balance against a target, and the z-loss.
#
# A balance loss is a product of how often experts are chosen (without gradient) and how probable they are. Once the
# first is known for all of a step, the rest is a plain sum over tokens; so the scope `step` takes one forward pass
# without gradient over all micro-steps, adds the counts up over processes, and each micro-step's term is then exact,
# whatever the accumulation. Both scopes average over the step's tokens, so micro-steps of padding alone count for
# nothing.


@dataclass(frozen=True)
class StepRouting:
    """What is known of a step before its first backward pass.

    Attributes:
        tokens: of the whole step without padding, over all processes.
        weights: of each layer's experts [layers, E], for the scope `step`; None where each micro-step has its own.
        base_chosen: the base's choices in each of this process's micro-steps, [layers, E] each; None unless needed.
    """

    tokens: float
    weights: Tensor | None = None
    base_chosen: tuple[Tensor, ...] | None = None


class RouterLoss:
    """Balance and z-loss of a step, micro-step by micro-step; `usage` counts what was chosen in all of them.

    Args:
        config: scope, target and coefficients.
        base: the live model.
        adapter: switched off for the base's own routing; only the target `base` needs it.
        accelerator: adds up over processes.
    """

    def __init__(self, config: TrainerConfig, base: Base, adapter: Adapter | None, accelerator: Accelerator) -> None:
        if config.router_balance_target == "base" and adapter is None:
            raise ValueError("the base's own routing takes an adapter that can be switched off")
        self.config, self.base, self.adapter, self.accelerator = config, base, adapter, accelerator
        shape = base.checkpoint.arch
        self.usage = UsageCounter(shape.num_layers, shape.num_experts, 1, base.device)

    def prepare(self, batches: Sequence[Batch]) -> StepRouting:
        """Look at a whole step before its first backward pass; call it with the model in training mode.

        Args:
            batches: this process's micro-steps; every process has equally many.
        """
        local = torch.tensor(sum(batch.num_tokens for batch in batches), dtype=torch.float64, device=self.base.device)
        tokens = float(self.accelerator.reduce(local, "sum").item())
        config = self.config
        if not config.router_balance_coefficient:
            return StepRouting(tokens)
        base_chosen = None
        if config.router_balance_target == "base":
            base_chosen = tuple(self._counts(batch, adapted=False) for batch in batches)
        if config.router_balance_scope == "microbatch":
            return StepRouting(tokens, None, base_chosen)
        # The pass draws the same dropout masks as the micro-steps will, so it counts the choices that they will make.
        with torch.random.fork_rng([self.base.device] if self.base.device.type == "cuda" else []):
            chosen = torch.stack([self._counts(batch, adapted=True) for batch in batches]).sum(0)
        total = self.accelerator.reduce(chosen, "sum")
        of_base = None if base_chosen is None else self.accelerator.reduce(torch.stack(base_chosen).sum(0), "sum")
        return StepRouting(tokens, balance_weights(total, of_base))

    def shares(
        self, layers: Sequence[RouterOutput], batch: Batch, step: StepRouting, number: int
    ) -> tuple[Tensor, Tensor]:
        """A micro-step's shares of the step's balance loss and z-loss; over all micro-steps they add up to them.

        Without a coefficient a share has no gradient: it is computed to be seen.

        Args:
            layers: routing of the micro-step, with gradient.
            batch: the micro-step.
            step: of `prepare`.
            number: of the micro-step within this process's, from 0.
        """
        rows = real_tokens(batch).to(self.base.device)
        self.usage.add(layers, rows)
        weights = step.weights
        if weights is None:
            base_chosen = None if step.base_chosen is None else step.base_chosen[number]
            weights = balance_weights(choice_counts(layers, rows), base_chosen)
        with torch.set_grad_enabled(self.config.router_balance_coefficient != 0):
            balance = balance_sum(layers, rows, weights) / step.tokens
        with torch.set_grad_enabled(self.config.router_z_loss_coefficient != 0):
            return balance, z_sum(layers, rows) / step.tokens

    @torch.no_grad()
    def _counts(self, batch: Batch, *, adapted: bool) -> Tensor:
        switched = nullcontext() if adapted or self.adapter is None else self.adapter.disabled()
        with switched, record_router(self.base.model) as tape:
            hidden_states(self.base.model, batch.input_ids, batch.positions, batch.segments)
        return choice_counts(tape.layers, real_tokens(batch).to(self.base.device))


def real_tokens(batch: Batch) -> Tensor:
    """Numbers of a batch's flattened tokens that are not padding: int64 [N]."""
    return (batch.segments != PADDING_SEGMENT).reshape(-1).nonzero()[:, 0]


# What the terms on the router can change: routers that are trained, and adapters upstream of some router.


def balance_reach(sites: list[Site], shape: Arch) -> list[Site]:
    """The sites that a loss on the routers' logits has a gradient for.

    A layer's router reads what its own attention and all earlier layers made. So it reaches every attention adapter,
    routers that are trained, and expert adapters of all layers but the last.
    """
    return [site for site in sites if site.kind != "experts" or site.layer < shape.num_layers - 1]


def describe_balance_reach(sites: list[Site], shape: Arch, mode: str = "frozen") -> str:
    """Say which adapters the balance loss and the z-loss reach.

    Args:
        sites: of the adapter.
        shape: of the base.
        mode: the recipe's `adapter.router.mode`.
    """
    reached = balance_reach(sites, shape)
    routers = sum(site.kind == "router" for site in reached)
    what = f"{len(reached)} of {len(sites)} adapter sites" + (f", {routers} of them routers" if routers else "")
    text = f"router: {mode}; the balance loss reaches {what}"
    if len(reached) < len(sites):
        text += f" (not the experts of layer {shape.num_layers - 1}: no router comes after them)"
    return text
