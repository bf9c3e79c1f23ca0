"""LoRA on attention projections and on routed experts, attached to a frozen base.

Module names of the base stay as they are: an adapted projection is still `q_proj` with its `weight` and `bias`, and
gains `lora_a` and `lora_b` beside them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GptOssForCausalLM

from finetune.adapters.sites import Site, plan_sites
from finetune.config.schema import AdapterConfig
from finetune.errors import CheckError
from finetune.kernels.experts import LoraFactors
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


class ExpertLora(nn.Module):
    """Updates of one layer's experts: gate_up a [E, L, D], b [E, 2F, L]; down a [E, L, F], b [E, D, L]."""

    def __init__(self, experts: PackedExperts, rank: int, scale: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale, self.enabled = scale, True
        self.gate_up_a, self.gate_up_b = self._factors(experts, "gate_up_proj", rank, dtype)
        self.down_a, self.down_b = self._factors(experts, "down_proj", rank, dtype)

    @staticmethod
    def _factors(experts: PackedExperts, name: str, rank: int, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
        (num_experts, out, inputs), device = experts.shapes[name], experts.get_buffer(f"{name}_bias").device
        a = torch.empty(num_experts, rank, inputs, device=device, dtype=dtype)
        return nn.Parameter(a), nn.Parameter(torch.zeros(num_experts, out, rank, device=device, dtype=dtype))

    def gate_up(self) -> LoraFactors | None:
        """The gate_up update, or None while the adapter is off."""
        return LoraFactors(self.gate_up_a, self.gate_up_b, self.scale) if self.enabled else None

    def down(self) -> LoraFactors | None:
        """The down update, or None while the adapter is off."""
        return LoraFactors(self.down_a, self.down_b, self.scale) if self.enabled else None


@dataclass(frozen=True)
class Adapter:
    """The trained part of a model.

    Attributes:
        sites: where it attaches.
        modules: the LoRA module of each site, in the same order.
    """

    sites: tuple[Site, ...]
    modules: tuple[LoraLinear | ExpertLora, ...]

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


def lora_parameters(module: LoraLinear | ExpertLora) -> dict[str, nn.Parameter]:
    """A site's trained parameters by their own names: `lora_a, lora_b` or `gate_up_a, gate_up_b, down_a, down_b`."""
    return {name: p for name, p in module.named_parameters() if name not in ("weight", "bias")}


def attach_adapter(base: Base, config: AdapterConfig, *, seed: int) -> Adapter:
    """Put a fresh adapter on a base: A uniform in +-1/sqrt(in), B zero, so that the model's output does not change.

    Every site draws from a generator of its own, seeded by `seed` and its name: adding a site changes no other.

    Raises:
        CheckError: a planned site is not in the model, or something else than LoRA would be trained.
    """
    sites = plan_sites(base.checkpoint.shape, config)
    modules = []
    for site in sites:
        module = _attach_site(base.model, site, config)
        for name, parameter in lora_parameters(module).items():
            if name.endswith("a"):
                _initialise(parameter, f"{site.module}.{name}", seed)
        modules.append(module)
    adapter = Adapter(tuple(sites), tuple(modules))
    _check_trainable(base.model, adapter)
    return adapter


def _attach_site(model: GptOssForCausalLM, site: Site, config: AdapterConfig) -> LoraLinear | ExpertLora:
    dtype = DTYPES[config.dtype]
    try:
        target = model.get_submodule(site.module)
    except AttributeError as error:
        raise CheckError(f"no module {site.module} to adapt", why="the model is not laid out as expected") from error
    if isinstance(target, PackedExperts):
        lora = ExpertLora(target, site.rank, site.scale, dtype)
        target.attach(lora)
        return lora
    if not isinstance(target, nn.Linear) or isinstance(target, LoraLinear):
        raise CheckError(f"{site.module} is a {type(target).__name__}, not a plain linear map")
    parent, _, name = site.module.rpartition(".")
    adapted = LoraLinear(target, site.rank, site.scale, config.attention.dropout, dtype)
    setattr(model.get_submodule(parent), name, adapted)
    return adapted


def _initialise(a: nn.Parameter, name: str, seed: int) -> None:
    """Fill [..., L, in] uniformly in +-1/sqrt(in), the same numbers on every device."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(a.shape[-1])
    with torch.no_grad():
        a.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) * bound)


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
