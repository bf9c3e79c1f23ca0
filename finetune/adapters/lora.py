"""LoRA on one layer's routed experts: on all of them or on some, with one rank or with a rank for each.

Files of others know one rank a layer and factors for every expert, so this module also says what it comes to there, and
takes that back.

Shape legend: E experts, S adapted ones, L rank, N sum of ranks, D hidden, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from finetune.adapters.sites import ExpertRanks, Selection, Site, plan_sites
from finetune.config.schema import AdapterConfig
from finetune.errors import CheckError
from finetune.files import seeded_generator
from finetune.kernels.dispatch import LoraExperts, LoraRanks
from finetune.kernels.experts import LoraFactors
from finetune.model.build import DTYPES, Base
from finetune.model.experts import PackedExperts
from finetune.model.nf4 import Nf4Linear, frozen_linear


def is_a(name: str) -> bool:
    """Whether a parameter is an A: the only ones that have no gradient on the first step, where every B is zero."""
    return name.endswith("_a")


class ExpertLora(nn.Module):
    """Updates of one layer's experts: gate_up a [S, L, D], b [S, 2F, L]; down a [S, L, F], b [S, D, L].

    S is the number of adapted experts; a factor that they share has 1 instead. Where ranks differ there is a row for
    each rank of each expert, N of them: gate_up a [N, D], b [N, 2F]; down a [N, F], b [N, D].

    Attributes:
        adapted: which experts these are. None: all, with one rank.
    """

    def __init__(self, experts: PackedExperts, site: Site, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale, self.enabled, self.share, self.rank = site.scale, True, site.share, site.rank
        self.num_experts = experts.shapes["down_proj"][0]
        device = experts.get_buffer("down_proj_bias").device
        self.adapted = _adapted(site, device)
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
        """Ranks of the adapted experts, where they differ."""
        return None if self.adapted is None else self.adapted.ranks

    def gate_up(self) -> LoraFactors | None:
        """The gate_up update, or None while the adapter is off."""
        return self._updates("gate_up") if self.enabled else None

    def down(self) -> LoraFactors | None:
        """The down update, or None while the adapter is off."""
        return self._updates("down") if self.enabled else None

    def _updates(self, name: str) -> LoraFactors:
        scale = self.scale if self.ranks is None else 1.0
        return LoraFactors(self._of_adapted(f"{name}_a"), self._of_adapted(f"{name}_b"), scale)

    def _of_adapted(self, name: str) -> Tensor:
        """A factor as the expert block takes it, a shared one repeated; differentiable."""
        factor = self.get_parameter(name)
        if self.share == "none" or not name.endswith(f"_{self.share}"):
            return factor
        count = self.num_experts if self.adapted is None else len(self.adapted.numbers)
        return factor.expand(count, -1, -1).contiguous()

    @torch.no_grad()
    def full_factor(self, name: str) -> Tensor:
        """One factor for each of the layer's E experts with one rank L and one scale, as files have it.

        Zeros for experts that are not adapted. Where ranks differ, zeros beyond an expert's rank, and its B, in
        float32, times what its scale is more than that of L.
        """
        factor = self._of_adapted(name)
        if self.adapted is None:
            return factor
        if self.ranks is not None:
            factor = factor if is_a(name) else factor.float() * (self.ranks.scales[:, None] / self.scale)
            whole = self.ranks.expand(factor, slice(0, len(self.adapted.numbers)))
            whole = F.pad(whole, (0, 0, 0, self.rank - whole.shape[1]))
            factor = whole if is_a(name) else whole.transpose(1, 2)
        return factor.new_zeros(self.num_experts, *factor.shape[1:]).index_copy(0, self.adapted.index, factor)

    @torch.no_grad()
    def from_full_factor(self, name: str, whole: Tensor) -> Tensor:
        """The inverse of `full_factor`, of a factor [E, L, in] or [E, out, L].

        Raises:
            ValueError: it has something where this module has nothing: in another expert, beyond an expert's rank, or
                a factor of its own where it is shared.
        """
        if self.adapted is not None and not is_a(name):
            _refuse_others(whole, self.adapted)
        chosen = whole if self.adapted is None else whole[self.adapted.index.to(whole.device)]
        if self.share != "none" and name.endswith(f"_{self.share}"):
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


def _refuse_others(b: Tensor, adapted: LoraExperts) -> None:
    """Raise ValueError if B [E, out, L] has something for an expert that is not adapted."""
    others = b.flatten(1).any(1).index_fill(0, adapted.index.to(b.device), False).nonzero()
    if len(others):
        raise ValueError(f"it updates expert {int(others[0])}, which the recipe does not adapt")


def _adapted(site: Site, device: torch.device) -> LoraExperts | None:
    if site.experts is None:
        return None
    ranks = None if site.ranks is None else LoraRanks.of(site.ranks, site.scales, device)
    return LoraExperts(site.experts, torch.tensor(site.experts, device=device), ranks)


# LoRA on attention projections, routers and routed experts, attached to a frozen base.
#
# Module names of the base stay as they are: an adapted projection is still `q_proj` with its `weight` and `bias`, and
# gains `lora_a` and `lora_b` beside them.


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
        seen = F.dropout(x, self.dropout, self.training)
        inner = F.linear(seen, self.lora_a.to(x.dtype)) * self.scale
        return out + F.linear(inner, self.lora_b.to(x.dtype))


class LoraRouter(GptOssTopKRouter):
    """A frozen router plus the update of its weight: low-rank, or (`whole`) a change of all of weight and bias.

    Args:
        base: the router it replaces; its weight [E, D] and bias [E] are shared, not copied.
        site: rank, scale and whether the change is whole.
        dtype: of what is trained.
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
        """[T, D] -> logits [T, E], the chosen experts' weights [T, K] and their numbers int64 [T, K]."""
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


LoraModule = LoraLinear | LoraRouter | ExpertLora


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
        """Whether a part of it fits into no adapter file of others: a change of the routers' biases."""
        return any(site.whole for site in self.sites)

    @contextmanager
    def without_router_bias(self) -> Iterator[None]:
        """Inside the block the model computes what an adapter file of others can say of it."""
        routers = [module for module in self.modules if isinstance(module, LoraRouter)]
        for router in routers:
            router.bias_enabled = False
        try:
            yield
        finally:
            for router in routers:
                router.bias_enabled = True


def lora_parameters(module: LoraModule) -> dict[str, nn.Parameter]:
    """A site's trained parameters by their own names.

    `lora_a, lora_b`; of experts `gate_up_a, gate_up_b, down_a, down_b`; of a whole router `weight_change, bias_change`.
    """
    return {name: p for name, p in module.named_parameters() if name not in ("weight", "bias")}


def attach_adapter(
    base: Base,
    config: AdapterConfig,
    *,
    seed: int,
    selection: Selection | None = None,
    ranks: ExpertRanks | None = None,
) -> Adapter:
    """Put a fresh adapter on a base: A uniform in +-1/sqrt(in), B zero, so that the model's output does not change.

    Every site draws from a generator of its own, seeded by `seed` and its name: adding a site changes no other, and
    an expert starts from the same A whichever others are adapted.

    Args:
        base: frozen.
        config: the recipe's adapter part.
        seed: of A.
        selection: which experts of each layer are adapted. None: all.
        ranks: of these experts, where they differ.

    Raises:
        CheckError: a planned site is not in the model, or something else than LoRA would be trained.
    """
    sites = plan_sites(base.checkpoint.arch, config, selection, ranks)
    modules = []
    for site in sites:
        module = _attach_site(base.model, site, config)
        for name, parameter in lora_parameters(module).items():
            if is_a(name):
                _initialise(parameter, f"{site.module}.{name}", seed, module)
        modules.append(module)
    adapter = Adapter(tuple(sites), tuple(modules))
    _check_trainable(base.model, adapter)
    return adapter


def _attach_site(model: GptOssForCausalLM, site: Site, config: AdapterConfig) -> LoraModule:
    dtype = DTYPES[config.dtype]
    try:
        target = model.get_submodule(site.module)
    except AttributeError as error:
        raise CheckError(f"no module {site.module} to adapt", why="the model is not laid out as expected") from error
    if isinstance(target, PackedExperts):
        lora = ExpertLora(target, site, dtype)
        target.attach(lora)
        return lora
    adapted: LoraLinear | LoraRouter
    if isinstance(target, GptOssTopKRouter) and not isinstance(target, LoraRouter):
        adapted = LoraRouter(target, site, dtype)
    elif isinstance(target, nn.Linear) and not isinstance(target, LoraLinear):
        adapted = LoraLinear(target, site.rank, site.scale, config.attention.dropout, dtype)
    else:
        raise CheckError(f"{site.module} is a {type(target).__name__}, not a plain linear map or router")
    parent, _, name = site.module.rpartition(".")
    setattr(model.get_submodule(parent), name, adapted)
    return adapted


def _initialise(a: nn.Parameter, name: str, seed: int, module: LoraModule) -> None:
    """Fill [..., L, in] uniformly in +-1/sqrt(in), the same numbers on every device."""
    generator = seeded_generator(seed, name)
    bound = 1 / math.sqrt(a.shape[-1])
    some = module if isinstance(module, ExpertLora) and module.share != "a" and module.adapted is not None else None
    shape = a.shape if some is None else torch.Size((some.num_experts, some.rank, a.shape[-1]))
    drawn = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    with torch.no_grad():
        a.copy_(drawn if some is None else some.from_full_factor(name.rpartition(".")[2], drawn.to(a.device)))


def _check_trainable(model: nn.Module, adapter: Adapter) -> None:
    wanted = {id(parameter) for parameter in adapter.parameters().values()}
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    stray = [name for key, name in trained.items() if key not in wanted]
    lost = len(wanted - trained.keys())
    planned = sum(site.num_parameters for site in adapter.sites)
    counted = sum(p.numel() for p in adapter.parameters().values())
    if stray or lost or planned != counted:
        raise CheckError(
            "what would be trained is not what was planned",
            why=f"outside the adapter: {stray[:3]}; not reached: {lost}; parameters {counted:,} against {planned:,}",
        )


# How large each update is, without ever forming one.


@torch.no_grad()
def update_norms(adapter: Adapter) -> dict[str, float]:
    """Frobenius norm of scale · BA by weight, such as `model.layers.0.self_attn.q_proj`; a layer's experts as one."""
    norms: dict[str, float] = {}
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        norms |= _norms_of(site, module)
    return norms


def _norms_of(site: Site, module: LoraModule) -> dict[str, float]:
    if isinstance(module, ExpertLora):
        return {
            f"{site.module}.{name}": module.scale
            * product_norm(module.full_factor(f"{part}_a"), module.full_factor(f"{part}_b"))
            for name, part in (("gate_up_proj", "gate_up"), ("down_proj", "down"))
        }
    if isinstance(module, LoraRouter) and module.whole:
        return {site.module: float(module.weight_change.float().norm())}
    return {site.module: module.scale * product_norm(module.lora_a, module.lora_b)}


def product_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of b @ a for a [..., L, in] and b [..., out, L], from their L x L Gram matrices."""
    left, right = b.double().mT @ b.double(), a.double() @ a.double().mT
    return math.sqrt(max(0.0, float((left * right).sum())))
