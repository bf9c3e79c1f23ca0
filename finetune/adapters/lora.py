"""LoRA on attention projections, routers and routed experts, attached to a frozen base.

Module names of the base stay as they are: an adapted projection is still `q_proj` with its `weight` and `bias`, and
gains `lora_a` and `lora_b` beside them.
"""

from __future__ import annotations

import hashlib
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

from finetune.adapters.expert_lora import ExpertLora, is_a
from finetune.adapters.sites import ExpertRanks, Selection, Site, plan_sites
from finetune.config.schema import AdapterConfig
from finetune.errors import CheckError
from finetune.model.build import DTYPES, Base
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
    sites = plan_sites(base.checkpoint.shape, config, selection, ranks)
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
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(a.shape[-1])
    some = module if isinstance(module, ExpertLora) and module.share != "a" and module.adapted is not None else None
    shape = a.shape if some is None else torch.Size((some.num_experts, some.rank, a.shape[-1]))
    drawn = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    with torch.no_grad():
        a.copy_(drawn if some is None else some.from_all_experts(name.rpartition(".")[2], drawn.to(a.device)))


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
