"""LoRA modules: attention projections, routers and routed experts with a trained update beside frozen weights.

Names of the base's modules stay as they are: an adapted projection is still `q_proj` with its `weight` and `bias`, and
gains `lora_a` and `lora_b`. `finetune.adapters.attach` puts the modules into a model.

A module has two forms. Trained: its parameters, which leave out experts that are not adapted, store a shared factor
once and give each expert a rank of its own. Stored: `LoraFactors` by weight name, as adapter files have them, with one
rank and one scale for all E experts (`stored_factors` and `load_factors` convert between the two).

Shape legend: E experts, S adapted ones, L rank, N sum of ranks, D hidden, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from finetune.adapters.sites import Site
from finetune.kernels.dispatch import LoraExperts, LoraRanks
from finetune.kernels.experts import LoraFactors
from finetune.model.experts import PackedExperts
from finetune.model.nf4 import Nf4Linear, frozen_linear


class LoraLinear(nn.Linear):
    """A frozen linear map plus scale · B A dropout(x).

    Args:
        base: the projection it replaces; its weight (see `frozen_linear`) and bias [out] are shared, not copied.
        rank, scale: of the update.
        dropout: share of x's elements that the update does not see in training mode.
        dtype: of the trained factors.
    """

    weight_scales: Tensor | None

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, dropout: float, dtype: torch.dtype = torch.float32
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        self.scale, self.dropout, self.enabled = scale, dropout, True
        device = base.weight.device
        self.register_buffer("weight_scales", base.weight_scales if isinstance(base, Nf4Linear) else None)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out = frozen_linear(x, self.weight, self.bias, self.weight_scales)
        if not self.enabled:
            return out
        dropped = F.dropout(x, self.dropout, self.training)
        inner = F.linear(dropped, self.lora_a.to(x.dtype)) * self.scale
        return out + F.linear(inner, self.lora_b.to(x.dtype))


class LoraRouter(GptOssTopKRouter):
    """A frozen router plus an update of its weight: low-rank, or (`whole`) a full change of weight and bias.

    Args:
        base: the router it replaces; its weight [E, D] and bias [E] are shared, not copied.
        site: rank, scale, and whether weight and bias are trained in full.
        dtype: of the trained parameters.
    """

    def __init__(self, base: GptOssTopKRouter, site: Site, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)
        self.top_k, self.num_experts, self.hidden_dim = base.top_k, base.num_experts, base.hidden_dim
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        self.scale, self.whole, self.enabled, self.bias_enabled = site.scale, site.whole, True, True
        new = partial(torch.zeros, device=base.weight.device, dtype=dtype)
        if self.whole:
            self.weight_change = nn.Parameter(new(self.num_experts, self.hidden_dim))
            self.bias_change = nn.Parameter(new(self.num_experts))
        else:
            self.lora_a = nn.Parameter(new(site.rank, self.hidden_dim))
            self.lora_b = nn.Parameter(new(self.num_experts, site.rank))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> logits [T, E], weights of the chosen experts [T, K] and their numbers int64 [T, K]."""
        logits = F.linear(hidden_states, self.weight, self.bias)
        if self.enabled:
            logits = logits + self._update(hidden_states)
        top = torch.topk(logits, self.top_k, dim=-1)
        return logits, top.values.softmax(-1), top.indices

    def _update(self, x: Tensor) -> Tensor:
        if not self.whole:
            inner = F.linear(x, self.lora_a.to(x.dtype)) * self.scale
            return F.linear(inner, self.lora_b.to(x.dtype))
        bias = self.bias_change.to(x.dtype) if self.bias_enabled else None
        return F.linear(x, self.weight_change.to(x.dtype), bias)


class ExpertLora(nn.Module):
    """Updates of one layer's experts: gate_up a [S, L, D], b [S, 2F, L]; down a [S, L, F], b [S, D, L].

    S is the number of adapted experts; a factor that they share has 1 instead. Where ranks differ there is a row for
    each rank of each expert, N of them: gate_up a [N, D], b [N, 2F]; down a [N, F], b [N, D].

    Attributes:
        adapted: the adapted experts and their ranks. None: all, with one rank.
    """

    def __init__(self, experts: PackedExperts, site: Site, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.site, self.scale, self.enabled = site, site.scale, True
        self.num_experts = experts.shapes["down_proj"][0]
        device = experts.get_buffer("down_proj_bias").device
        self.adapted = adapted_experts(site, device)
        for name, (num_experts, out, inputs) in experts.shapes.items():
            count = num_experts if site.experts is None else len(site.experts)
            new = partial(torch.zeros, device=device, dtype=dtype)
            if site.ranks is None:
                a = new(1 if site.share == "a" else count, site.rank, inputs)
                b = new(1 if site.share == "b" else count, out, site.rank)
            else:
                a, b = new(sum(site.ranks), inputs), new(sum(site.ranks), out)
            self.register_parameter(f"{name.removesuffix('_proj')}_a", nn.Parameter(a))
            self.register_parameter(f"{name.removesuffix('_proj')}_b", nn.Parameter(b))

    @property
    def ranks(self) -> LoraRanks | None:
        """LoraRanks of the adapted experts, where they differ."""
        return None if self.adapted is None else self.adapted.ranks

    def gate_up(self) -> LoraFactors | None:
        """The gate_up update, or None while the adapter is off."""
        return self._updates("gate_up") if self.enabled else None

    def down(self) -> LoraFactors | None:
        """The down update, or None while the adapter is off."""
        return self._updates("down") if self.enabled else None

    def _updates(self, name: str) -> LoraFactors:
        scale = self.scale if self.ranks is None else 1.0
        a, b = (_repeat_shared(self.get_parameter(f"{name}_{f}"), f, self.site, self.num_experts) for f in "ab")
        return LoraFactors(a, b, scale)

    @torch.no_grad()
    def full_factor(self, name: str) -> Tensor:
        """A parameter in its stored form, see `full_factor`."""
        return full_factor(self.get_parameter(name), name, self.site, self.num_experts, self.adapted)

    @torch.no_grad()
    def from_full_factor(self, name: str, full: Tensor) -> Tensor:
        """The inverse of `full_factor`, of a factor [E, L, in] or [E, out, L].

        Raises:
            ValueError: the factor has an update that this module has no parameter for: of an expert that is not
                adapted, beyond an expert's rank, or of its own where experts share it.
        """
        if self.adapted is not None and not is_a(name):
            _refuse_other_experts(full, self.adapted)
        chosen = full if self.adapted is None else full[self.adapted.index.to(full.device)]
        if name.endswith(f"_{self.site.share}"):
            if not torch.equal(chosen, chosen[:1].expand_as(chosen)):
                raise ValueError(f"{name} differs among experts, and the recipe shares it")
            return chosen[:1]
        if self.ranks is None:
            return chosen
        by_row = (chosen if is_a(name) else chosen.transpose(1, 2)).to(self.ranks.scales.device)
        stored = self.ranks.collapse(by_row, slice(0, len(chosen)))
        if is_a(name):
            return stored
        if int(by_row.count_nonzero()) != int(stored.count_nonzero()):
            raise ValueError(f"{name} goes beyond the ranks that the recipe gives its experts")
        return stored.float() / (self.ranks.scales[:, None] / self.scale)


def is_a(name: str) -> bool:
    """Whether a parameter is an A: the only ones without a gradient on the first step, where every B is zero."""
    return name.endswith("_a")


def adapted_experts(site: Site, device: torch.device) -> LoraExperts | None:
    """The adapted experts of a site as the expert block takes them; None if all are, with one rank."""
    if site.experts is None:
        return None
    ranks = None if site.ranks is None else LoraRanks.of(site.ranks, site.scales, device)
    return LoraExperts(site.experts, torch.tensor(site.experts, device=device), ranks)


def full_factor(factor: Tensor, name: str, site: Site, num_experts: int, adapted: LoraExperts | None) -> Tensor:
    """A trained expert factor for each of the layer's E experts, with one rank L and one scale, as files have it.

    Zeros for experts that are not adapted. Where ranks differ: zeros beyond an expert's rank, and B, in float32, times
    the expert's scale over the site's.

    Args:
        factor: parameter of `ExpertLora`.
        name: of the parameter, such as `down_b`.
        site: its site; `num_experts` is E.
        adapted: from `adapted_experts`.

    Returns:
        [E, L, in] for an A, [E, out, L] for a B.
    """
    factor = _repeat_shared(factor, name[-1], site, num_experts)
    if adapted is None:
        return factor
    if adapted.ranks is not None:
        ranks = adapted.ranks
        factor = factor if is_a(name) else factor.float() * (ranks.scales[:, None] / site.scale)
        expanded = ranks.expand(factor, slice(0, len(adapted.numbers)))
        expanded = F.pad(expanded, (0, 0, 0, site.rank - expanded.shape[1]))
        factor = expanded if is_a(name) else expanded.transpose(1, 2)
    return factor.new_zeros(num_experts, *factor.shape[1:]).index_copy(0, adapted.index, factor)


def _repeat_shared(factor: Tensor, kind: str, site: Site, num_experts: int) -> Tensor:
    """A factor of kind `a` or `b` as the expert block takes it, a shared one repeated; differentiable."""
    if site.share != kind:
        return factor
    count = num_experts if site.experts is None else len(site.experts)
    return factor.expand(count, -1, -1).contiguous()


def _refuse_other_experts(b: Tensor, adapted: LoraExperts) -> None:
    """Raise ValueError if B [E, out, L] has an update of an expert that is not adapted."""
    others = b.flatten(1).any(1).index_fill(0, adapted.index.to(b.device), False).nonzero()
    if len(others):
        raise ValueError(f"it updates expert {int(others[0])}, which the recipe does not adapt")


LoraModule = LoraLinear | LoraRouter | ExpertLora


def lora_parameters(module: LoraModule) -> dict[str, nn.Parameter]:
    """Trained parameters of a site by their own names.

    `lora_a, lora_b`; of experts `gate_up_a, gate_up_b, down_a, down_b`; of a router trained in full `weight_change,
    bias_change`.
    """
    return {name: p for name, p in module.named_parameters() if name not in ("weight", "bias")}


@dataclass(frozen=True)
class Adapter:
    """The trained part of a model.

    Attributes:
        sites: where it attaches.
        modules: the LoRA module of each site, in the same order.
    """

    sites: tuple[Site, ...]
    modules: tuple[LoraModule, ...]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, such as `model.layers.0.mlp.experts.gate_up_a`."""
        return {
            f"{site.module}.{name}": parameter
            for site, module in zip(self.sites, self.modules, strict=True)
            for name, parameter in lora_parameters(module).items()
        }

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model computes what the base computes."""
        for module in self.modules:
            module.enabled = False
        try:
            yield
        finally:
            for module in self.modules:
                module.enabled = True

    @property
    def changes_router_bias(self) -> bool:
        """Whether it changes routers' biases, which PEFT's layout has no place for."""
        return any(site.whole for site in self.sites)

    @contextmanager
    def without_router_bias(self) -> Iterator[None]:
        """Inside the block the model computes what PEFT's layout can express."""
        routers = [module for module in self.modules if isinstance(module, LoraRouter)]
        for router in routers:
            router.bias_enabled = False
        try:
            yield
        finally:
            for router in routers:
                router.bias_enabled = True


# ---- the stored form


def stored_factors(site: Site, module: LoraModule) -> dict[str, LoraFactors]:
    """A site's update by weight name as files have it, detached (experts: `gate_up_proj` and `down_proj`).

    The change of a router's weight trained in full is written as A = change [E, D], B = unit matrix / scale [E, E].
    """
    if isinstance(module, ExpertLora):
        return {
            f"{part}_proj": LoraFactors(
                module.full_factor(f"{part}_a").detach(), module.full_factor(f"{part}_b").detach(), site.scale
            )
            for part in ("gate_up", "down")
        }
    if isinstance(module, LoraRouter) and module.whole:
        return {site.name: full_change(module.weight_change.detach().float(), site.scale)}
    return {site.name: LoraFactors(module.lora_a.detach(), module.lora_b.detach(), site.scale)}


def full_change(change: Tensor, scale: float) -> LoraFactors:
    """A change [E, D] of a whole weight as low-rank factors of rank E."""
    return LoraFactors(change, torch.eye(len(change), device=change.device) / scale, scale)


@torch.no_grad()
def load_factors(site: Site, module: LoraModule, stored: Mapping[str, LoraFactors]) -> None:
    """Set a site's parameters from its stored form: the inverse of `stored_factors`.

    Raises:
        ValueError: the factors have an update that the site has no parameter for (see `ExpertLora.from_full_factor`).
    """
    if isinstance(module, LoraRouter) and module.whole:
        found = stored[site.name]
        module.weight_change.copy_(found.b.float() @ found.a.float() * site.scale)
        return
    for name, parameter in lora_parameters(module).items():
        if isinstance(module, ExpertLora):
            found = stored[f"{name[:-2]}_proj"]
            parameter.copy_(module.from_full_factor(name, found.a if is_a(name) else found.b))
        else:
            parameter.copy_(stored[site.name].a if is_a(name) else stored[site.name].b)


def router_bias_changes(adapter: Adapter) -> dict[str, Tensor]:
    """Changes of routers' biases by tensor name, float32 [E] each; empty unless routers are trained in full."""
    return {
        f"{site.module}.bias": module.bias_change.detach().float().cpu()
        for site, module in zip(adapter.sites, adapter.modules, strict=True)
        if isinstance(module, LoraRouter) and module.whole
    }


# ---- sizes of updates, without forming one


def dense_update(factors: LoraFactors) -> Tensor:
    """The update of a weight, scale · b @ a: float32 [out, in] or [E, out, in]."""
    return (factors.b @ factors.a).mul_(factors.scale)


@torch.no_grad()
def update_norms(adapter: Adapter) -> dict[str, float]:
    """Frobenius norm of scale · BA by weight, such as `model.layers.0.self_attn.q_proj`; a layer's experts as one."""
    norms: dict[str, float] = {}
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        if isinstance(module, LoraRouter) and module.whole:
            norms[site.module] = float(module.weight_change.float().norm())
            continue
        for name, found in stored_factors(site, module).items():
            path = f"{site.module}.{name}" if site.kind == "experts" else site.module
            norms[path] = found.scale * product_norm(found.a, found.b)
    return norms


def product_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of b @ a for a [..., L, in] and b [..., out, L], from their L x L Gram matrices."""
    return math.sqrt(max(0.0, float(_gram(a, b).sum())))


def squared_norm(factors: LoraFactors) -> Tensor:
    """Squared Frobenius norm of the update, float64: [] or [E]. Nothing larger than the factors and L x L is formed."""
    return _gram(factors.a, factors.b).sum((-2, -1)).clamp(min=0) * factors.scale**2


def _gram(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return (a @ a.mT) * (b.mT @ b)
