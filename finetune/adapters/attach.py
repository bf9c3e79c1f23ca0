"""Put an adapter on a base: a fresh one to train, one from a file to run, or a file's layer to merge.

Shape legend: E experts, L rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssTopKRouter

from finetune.adapters.layout import ATTENTION, EXPERTS, ROUTER, StoredSite
from finetune.adapters.lora import (
    Adapter,
    ExpertLora,
    LoraLinear,
    LoraModule,
    LoraRouter,
    dense_update,
    is_a,
    load_factors,
    lora_parameters,
)
from finetune.adapters.sites import ExpertRanks, Selection, Site, SiteKind, plan_sites
from finetune.adapters.store import AdapterFile, load_router_bias
from finetune.arch import router_path
from finetune.config.schema import AdapterConfig
from finetune.errors import CheckError, InputError
from finetune.files import seeded_generator
from finetune.kernels.experts import LoraFactors
from finetune.model.build import DTYPES, Base
from finetune.model.experts import PackedExperts


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
        selection: the experts of each layer that are adapted. None: all.
        ranks: of these experts, where they differ.

    Raises:
        CheckError: a planned site is not in the model, or something else than LoRA would be trained.
    """
    sites = plan_sites(base.checkpoint.arch, config, selection, ranks)
    adapter = _attach_sites(base.model, sites, DTYPES[config.dtype], config.attention.dropout)
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        for name, parameter in lora_parameters(module).items():
            if is_a(name):
                _initialise(parameter, f"{site.module}.{name}", seed, module)
    _check_trainable(base.model, adapter)
    return adapter


def attach_file(base: Base, file: AdapterFile, dtype: torch.dtype = torch.float32) -> Adapter:
    """Put an adapter from a file on a base, with the file's own sites and ranks, every expert adapted.

    Args:
        base: frozen; the one the adapter was trained on.
        file: opened.
        dtype: of the factors in memory.

    Raises:
        InputError: a layer's two expert projections differ in rank or scale or one is missing, a site is not in the
            base, or a factor is not finite.
    """
    adapter = _attach_sites(base.model, live_sites(file), dtype, dropout=0.0)
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        stored = {name: file.read(found) for name in site.weights if (found := file.site(site.layer, name))}
        load_factors(site, module, stored)
    load_router_bias(adapter, file)
    return adapter


def live_sites(file: AdapterFile) -> list[Site]:
    """The sites of a file as a model is adapted with them: a layer's expert projections are one site.

    Raises:
        InputError: the projections differ in rank or scale, or one is missing.
    """
    sites = []
    for stored in file.sites:
        if stored.name not in EXPERTS:
            whole = f"{stored.module}.bias" in file.router_bias
            sites.append(_live_site("router" if stored.name == ROUTER else "attention", stored.module, stored, whole))
        elif stored.name == EXPERTS[0] or file.site(stored.layer, EXPERTS[0]) is None:
            pair = [file.site(stored.layer, name) for name in EXPERTS]
            ranks = {(site.rank, site.scale) if site else None for site in pair}
            if len(ranks) > 1:
                raise InputError(
                    f"{file.directory}: the experts' projections of layer {stored.layer} are not adapted alike",
                    why="gate_up_proj and down_proj must both be adapted, with one rank and one scale",
                    fix="serve or merge it: finetune export",
                )
            sites.append(_live_site("experts", stored.module.removesuffix(f".{stored.name}"), stored))
    return sites


def _live_site(kind: SiteKind, module: str, stored: StoredSite, whole: bool = False) -> Site:
    """A site with the rank and scale of a stored one; its parameters are not counted."""
    return Site(kind, stored.layer, module, stored.rank, stored.scale * stored.rank, stored.scale, 0, whole=whole)


def _attach_sites(model: GptOssForCausalLM, sites: list[Site], dtype: torch.dtype, dropout: float) -> Adapter:
    return Adapter(tuple(sites), tuple(_attach_site(model, site, dtype, dropout) for site in sites))


def _attach_site(model: GptOssForCausalLM, site: Site, dtype: torch.dtype, dropout: float) -> LoraModule:
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
        adapted = LoraLinear(target, site.rank, site.scale, dropout, dtype)
    else:
        raise CheckError(f"{site.module} is a {type(target).__name__}, not a plain linear map or router")
    parent, _, name = site.module.rpartition(".")
    setattr(model.get_submodule(parent), name, adapted)
    return adapted


def _initialise(a: nn.Parameter, name: str, seed: int, module: LoraModule) -> None:
    """Fill [..., L, in] uniformly in +-1/sqrt(in), the same numbers on every device."""
    generator = seeded_generator(seed, name)
    bound = 1 / math.sqrt(a.shape[-1])
    # Numbers are drawn for all experts, so that an expert's do not depend on which others are adapted.
    some = module if isinstance(module, ExpertLora) and module.site.share != "a" and module.adapted else None
    shape = a.shape if some is None else torch.Size((some.num_experts, some.site.rank, a.shape[-1]))
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


# ---- a file's layer, as merges have it


class StoredExperts(nn.Module):
    """Updates of all of one layer's experts as a file has them; a projection may be missing, and ranks may differ."""

    adapted = None

    def __init__(self, factors: Mapping[str, LoraFactors]) -> None:
        super().__init__()
        self.factors = factors

    def gate_up(self) -> LoraFactors | None:
        """The gate_up update, if there is one."""
        return self.factors.get("gate_up_proj")

    def down(self) -> LoraFactors | None:
        """The down update, if there is one."""
        return self.factors.get("down_proj")


@torch.no_grad()
def attach_for_merge(base: Base, file: AdapterFile) -> None:
    """Attach every site of a file to a base that has none, as a merge applies them (see `attach_layer`)."""
    for number, layer in enumerate(base.model.model.layers):
        attach_layer(layer, file, number, base.device)


@torch.no_grad()
def attach_layer(layer: GptOssDecoderLayer, file: AdapterFile, number: int, device: torch.device) -> None:
    """Attach one layer's sites as a merge applies them: a router's update goes into its weight and bias.

    Unlike `attach_file` this takes any set of sites, such as one expert projection alone.

    Args:
        layer: transformers' decoder layer with packed experts.
        file: the adapter.
        number: of the layer.
        device: of the layer.
    """
    factors = {name: LoraFactors(f.a.to(device), f.b.to(device), f.scale) for name, f in file.layer(number).items()}
    for name in ATTENTION:
        if name in factors:
            rank = len(factors[name].a)
            adapted = LoraLinear(getattr(layer.self_attn, name), rank, factors[name].scale, 0.0)
            adapted.lora_a.copy_(factors[name].a)
            adapted.lora_b.copy_(factors[name].b)
            setattr(layer.self_attn, name, adapted)
    if ROUTER in factors:
        weight = layer.mlp.router.weight  # not written into: it may be the mapped file itself
        weight.data = (weight.float() + dense_update(factors[ROUTER])).to(weight.dtype)
    if (change := file.router_bias.get(f"{router_path(number)}.bias")) is not None:
        bias = layer.mlp.router.bias
        bias.data = (bias.float() + change.to(device)).to(bias.dtype)
    experts = {name: found for name, found in factors.items() if name in EXPERTS}
    if experts:
        layer.mlp.experts.attach(StoredExperts(experts))
