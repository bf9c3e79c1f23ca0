"""The router's terms of a step: load balance against a target, and the z-loss.

A balance loss multiplies how often experts are chosen (without gradient) by how probable they are. Once the first is
known for all of a step, the rest is a plain sum over tokens. So the scope `step` takes one forward pass without
gradient over all micro-batches and adds the counts up over ranks; each micro-batch's term is then exact, however the
step is split. Both scopes average over the step's tokens, so micro-batches of padding alone contribute nothing.

Shape legend: T tokens of a batch, N of them that are not padding, E experts, K active experts per token.
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
from finetune.model.build import Base
from finetune.model.forward import RouterOutput, hidden_states, record_router
from finetune.objectives.base import Term

BALANCE_LOSS = "balance_loss"
Z_LOSS = "router_z_loss"


@dataclass(frozen=True)
class RouterContext:
    """Router figures of a whole step, computed before its first backward pass.

    Attributes:
        num_tokens: of the whole step without padding, over all ranks.
        weights: of each layer's experts [layers, E], for the scope `step`; None where each micro-batch has its own.
        base_chosen: the base's choices in each of this rank's micro-batches, [layers, E] each; None unless needed.
    """

    num_tokens: float
    weights: Tensor | None = None
    base_chosen: tuple[Tensor, ...] | None = None


class RouterTerms:
    """Balance loss and z-loss of a step, micro-batch by micro-batch.

    Args:
        config: scope, target and coefficients.
        base: the live model.
        adapter: disabled to measure the base's own routing; only the target `base` needs it.
        accelerator: sums over ranks.

    Attributes:
        coefficients: the factor of each term in what is minimised, by name.
    """

    def __init__(self, config: TrainerConfig, base: Base, adapter: Adapter | None, accelerator: Accelerator) -> None:
        if config.router_balance_target == "base" and adapter is None:
            raise ValueError("measuring the base's own routing needs the adapter, to disable it")
        self.config, self.base, self.adapter, self.accelerator = config, base, adapter, accelerator
        self.coefficients = {
            BALANCE_LOSS: config.router_balance_coefficient,
            Z_LOSS: config.router_z_loss_coefficient,
        }

    def prepare(self, batches: Sequence[Batch]) -> RouterContext:
        """Measure a whole step before its first backward pass; the model must be in training mode.

        Args:
            batches: this rank's micro-batches; every rank has equally many.
        """
        local = torch.tensor(sum(batch.num_tokens for batch in batches), dtype=torch.float64, device=self.base.device)
        num_tokens = float(self.accelerator.reduce(local, "sum").item())
        config = self.config
        if not config.router_balance_coefficient:
            return RouterContext(num_tokens)
        base_chosen = None
        if config.router_balance_target == "base":
            base_chosen = tuple(self._choices(batch, adapted=False) for batch in batches)
        if config.router_balance_scope == "microbatch":
            return RouterContext(num_tokens, None, base_chosen)
        # The pass draws the same dropout masks as the micro-batches will, so it counts the choices that they will make.
        with torch.random.fork_rng([self.base.device] if self.base.device.type == "cuda" else []):
            chosen = torch.stack([self._choices(batch, adapted=True) for batch in batches]).sum(0)
        total = self.accelerator.reduce(chosen, "sum")
        of_base = None if base_chosen is None else self.accelerator.reduce(torch.stack(base_chosen).sum(0), "sum")
        return RouterContext(num_tokens, balance_weights(total, of_base))

    def terms(
        self, layers: Sequence[RouterOutput], tokens: Tensor, context: RouterContext, number: int
    ) -> dict[str, Term]:
        """A micro-batch's shares of the step's balance loss and z-loss.

        A share with coefficient 0 is computed for the log, without gradient.

        Args:
            layers: router output of each layer, with gradient.
            tokens: int64 [N], see `real_tokens`.
            context: of `prepare`.
            number: of the micro-batch on this rank, from 0.
        """
        weights = context.weights
        if weights is None:
            base_chosen = None if context.base_chosen is None else context.base_chosen[number]
            weights = balance_weights(choice_counts(layers, tokens), base_chosen)
        with torch.set_grad_enabled(self.coefficients[BALANCE_LOSS] != 0):
            balance = balance_sum(layers, tokens, weights) / context.num_tokens
        with torch.set_grad_enabled(self.coefficients[Z_LOSS] != 0):
            router_z = z_sum(layers, tokens) / context.num_tokens
        return {BALANCE_LOSS: Term(balance), Z_LOSS: Term(router_z)}

    @torch.no_grad()
    def _choices(self, batch: Batch, *, adapted: bool) -> Tensor:
        """Choices of each expert in a batch, by the base with or without the adapter: [layers, E]."""
        switched = nullcontext() if adapted or self.adapter is None else self.adapter.disabled()
        with switched, record_router(self.base.model) as tape:
            hidden_states(self.base.model, batch.input_ids, batch.positions, batch.segments, batch.prefixes)
        return choice_counts(tape.layers, real_tokens(batch).to(self.base.device))


def real_tokens(batch: Batch) -> Tensor:
    """Indices of a batch's flattened tokens that are not padding: int64 [N]."""
    return (batch.segments != PADDING_SEGMENT).reshape(-1).nonzero()[:, 0]


# ---- the losses -----------------------------------------------------------------------------------------------------


def choice_counts(layers: Sequence[RouterOutput], tokens: Tensor) -> Tensor:
    """Count the choices of each expert: float64 [layers, E], without gradient.

    Args:
        layers: router output of each layer.
        tokens: int64 [N], the tokens that are not padding.
    """
    num_experts = layers[0].logits.shape[1]
    chosen = torch.stack([routing.expert_ids[tokens].reshape(-1) for routing in layers])
    counts = torch.zeros(len(layers), num_experts, dtype=torch.float64, device=chosen.device)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))


def balance_weights(chosen: Tensor, base_chosen: Tensor | None = None) -> Tensor:
    """The factor of each expert's mean probability in the balance loss: [..., E], without gradient.

    Against uniform use it is E · f_e, with f_e the share of the choices that fell on e. Against the base's use it is
    (n_e + 1) / (m_e + 1), with n_e and m_e the choices of e now and by the base on the same tokens: f_e / q_e, with one
    more choice of each so that an expert the base never chose has a finite weight. Either way all weights are 1 where
    use is on target, and the loss is then 1 and has no gradient.

    Args:
        chosen: counts [..., E].
        base_chosen: the base's counts for the same tokens. None: the target is uniform.
    """
    if base_chosen is not None:
        return (chosen + 1) / (base_chosen + 1)
    return chosen.shape[-1] * chosen / chosen.sum(-1, keepdim=True).clamp(min=1)


def balance_sum(layers: Sequence[RouterOutput], tokens: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of sum_e weight_e · p_e, mean over layers: the loss times the number of its tokens.

    Args:
        layers: router output of each layer; p is the float32 softmax over all E logits (float64 for float64 logits).
        tokens: int64 [N], the tokens that are not padding.
        weights: [layers, E] of `balance_weights`.
    """
    per_layer = []
    for routing, weight in zip(layers, weights, strict=True):
        logits = _exact(routing.logits[tokens])
        per_layer.append((logits.softmax(-1).sum(0) * weight.to(logits.dtype)).sum())
    return torch.stack(per_layer).mean()


def z_sum(layers: Sequence[RouterOutput], tokens: Tensor) -> Tensor:
    """Sum over tokens of the squared log-sum-exp of the router's logits, mean over layers (Zoph et al. 2022)."""
    return torch.stack([_exact(routing.logits[tokens]).logsumexp(-1).square().sum() for routing in layers]).mean()


def balance_loss(layers: Sequence[RouterOutput], is_real: Tensor) -> Tensor:
    """Load balance of one micro-batch by itself against uniform use, mean over layers: E · sum_e f_e · P_e.

    P_e is the mean over real tokens of the float32 softmax over all E logits; f_e is the share of their T·K choices
    that fell on e, without gradient. It is 1 when f is uniform. transformers' `load_balancing_loss_func` is K times
    this and pools all layers first, so that opposite imbalances in two layers cancel.

    Args:
        layers: router output of each layer (logits [T, E], expert_ids [T, K]).
        is_real: bool [T], False on padding. With none at all the loss is 1 and has no gradient.
    """
    tokens = is_real.nonzero()[:, 0]  # once for all layers: on a GPU this waits for the device
    if not len(tokens):  # padding alone routes nothing
        return layers[0].logits.sum() * 0.0 + 1.0
    return balance_sum(layers, tokens, balance_weights(choice_counts(layers, tokens))) / len(tokens)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


# ---- their reach ----------------------------------------------------------------------------------------------------


def router_reach(sites: Sequence[Site], arch: Arch) -> list[Site]:
    """The sites that a loss on the routers' logits has a gradient for.

    A layer's router reads the output of its own attention and of all earlier layers. So a loss on it reaches every
    attention adapter, routers that are trained, and expert adapters of all layers but the last.
    """
    return [site for site in sites if site.kind != "experts" or site.layer < arch.num_layers - 1]


def describe_router_reach(sites: Sequence[Site], arch: Arch, mode: str = "frozen") -> str:
    """Say which adapters the balance loss and the z-loss reach.

    Args:
        sites: of the adapter.
        arch: of the base.
        mode: the recipe's `adapter.router.mode`.
    """
    reached = router_reach(sites, arch)
    routers = sum(site.kind == "router" for site in reached)
    what = f"{len(reached)} of {len(sites)} adapter sites" + (f", {routers} of them routers" if routers else "")
    text = f"router: {mode}; the balance loss reaches {what}"
    if len(reached) < len(sites):
        text += f" (not the experts of layer {arch.num_layers - 1}: no router comes after them)"
    return text
