"""PEFT's file layout for gpt-oss: tensor names, factor shapes and adapter_config.json, in both directions.

PEFT >= 0.19.1 flattens the expert axis into the rank: `lora_A` is expert-major [E·r, in], `lora_B` is rank-major with
the expert fastest [out, r·E]. `experts.base_layer.lora_*` is gate_up_proj and `experts.lora_*` is down_proj, because
PEFT wraps the module once per parameter and gate_up_proj ends up inside. We always write both: with one target alone
the keys are `experts.lora_*` whichever it is. down_proj is square in the published models, so no shape check would find
a swap; the read-back (`finetune.adapters.read_back`) compares logits instead.

Shape legend: E experts, r rank. Attention and router: a [r, in], b [out, r]. Experts: a [E, r, in], b [E, out, r].
The update of a weight [out, in] (of one expert) is scale · b @ a; gate and up interleave along out, even is gate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from finetune.adapters.config_file import CONFIG, PeftConfig
from finetune.adapters.sites import Site
from finetune.arch import ATTENTION_PROJECTIONS as ATTENTION
from finetune.arch import EXPERT_PROJECTIONS as EXPERTS
from finetune.arch import layer_prefix
from finetune.errors import InputError

PREFIX = "base_model.model."
ROUTER = "router"
Number = int | float
_LAYER = re.compile(r"^model\.layers\.\d+\.")
_KEY = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(?P<layer>\d+)\."
    r"(?P<module>self_attn\.[qkvo]_proj|mlp\.router|mlp\.experts\.base_layer|mlp\.experts)"
    r"\.lora_(?P<factor>[AB])\.weight"
)


# ---- names and shapes


def path_in_layer(name: str) -> str:
    """Path of a weight inside its layer: `self_attn.q_proj`, `mlp.router` or `mlp.experts.down_proj`."""
    return f"self_attn.{name}" if name in ATTENTION else f"mlp.experts.{name}" if name in EXPERTS else f"mlp.{name}"


def module_path(layer: int, name: str) -> str:
    """Path of a weight in the model, without `.weight`.

    >>> module_path(3, "down_proj")
    'model.layers.3.mlp.experts.down_proj'
    """
    return layer_prefix(layer) + path_in_layer(name)


def factor_keys(layer: int, name: str) -> tuple[str, str]:
    """PEFT's keys of A and B for one weight."""
    path = PREFIX + module_path(layer, name)
    if name in EXPERTS:  # PEFT wraps the experts module once per projection, gate_up_proj inside
        path = path.removesuffix(f".{name}") + (".base_layer" if name == "gate_up_proj" else "")
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def flatten_a(a: Tensor) -> Tensor:
    """A in PEFT's shape: [E, r, in] -> [E·r, in]; two-dimensional factors stay as they are."""
    return a.reshape(-1, a.shape[-1]).contiguous()


def flatten_b(b: Tensor) -> Tensor:
    """B in PEFT's shape: [E, out, r] -> [out, r·E]; two-dimensional factors stay as they are."""
    return b.contiguous() if b.dim() == 2 else b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()


def unflatten(a: Tensor, b: Tensor, num_experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """The inverse of `flatten_a` and `flatten_b`; `num_experts` is 0 for attention and the router."""
    if not num_experts:
        return a, b
    return a.reshape(num_experts, rank, -1), b.reshape(len(b), rank, num_experts).permute(2, 0, 1).contiguous()


# ---- adapter_config.json, written


@dataclass(frozen=True)
class Strength:
    """Rank and alpha of one adapted weight."""

    rank: int
    alpha: float


def site_strengths(sites: Iterable[Site]) -> dict[str, Strength]:
    """Rank and alpha of every weight of live sites, by the full name PEFT targets (see `lora_config_fields`)."""
    strengths: dict[str, Strength] = {}
    for site in sites:
        parts = [f".{name}" for name in EXPERTS] if site.kind == "experts" else [".weight" * (site.kind == "router")]
        strengths |= {site.module + part: Strength(site.rank, site.alpha) for part in parts}
    return strengths


def lora_config_fields(weights: Mapping[str, Strength], *, every_layer: bool, rslora: bool) -> dict[str, object]:
    """The fields of PEFT's `LoraConfig` that set what is adapted, and with which rank and alpha.

    PEFT's own `layers_to_transform` limits modules but not parameters (PEFT 0.21.2 adapts the experts of all layers),
    so a subset of layers is written as full names. `use_rslora` goes with patterns when loading: the scale is
    alpha / sqrt(rank) with the site's own numbers (PEFT 0.21.2; it refuses the two together only when converting PiSSA
    and the like on saving).

    Args:
        weights: full name -> strength, such as `model.layers.0.self_attn.q_proj`, `model.layers.0.mlp.router.weight`
            or `model.layers.0.mlp.experts.down_proj`; both projections of a layer's experts or neither.
        every_layer: the same weights are adapted in every layer of the model.
        rslora: scales are alpha / sqrt(rank).
    """
    names = {name: _LAYER.sub("", name) if every_layer else name for name in weights}
    parameters = [full for full in names if ".mlp." in full]  # PEFT calls a weight outside an nn.Linear a parameter
    modules = [full for full in names if full not in parameters]
    default = weights[(modules or parameters)[0]]
    fields: dict[str, object] = {
        "r": default.rank,
        "lora_alpha": _plain_number(default.alpha),
        # vLLM requires the key, and PEFT takes an empty list when parameters are targeted.
        "target_modules": list(dict.fromkeys(names[full].removeprefix("self_attn.") for full in modules)),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    if rslora:
        fields["use_rslora"] = True
    if parameters:
        fields["target_parameters"] = list(dict.fromkeys(names[full] for full in parameters))
    if ranks := _pattern({name: strength.rank for name, strength in weights.items()}, default.rank):
        fields["rank_pattern"] = ranks
    if alphas := _pattern({name: _plain_number(s.alpha) for name, s in weights.items()}, _plain_number(default.alpha)):
        fields["alpha_pattern"] = alphas
    return fields


def _pattern(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """Values that differ from the default: by the name without its layer if all layers agree, else by full name."""
    by_name: dict[str, set[Number]] = {}
    for full, value in values.items():
        by_name.setdefault(_LAYER.sub("", full), set()).add(value)
    pattern: dict[str, Number] = {}
    for full, value in values.items():
        name = _LAYER.sub("", full)
        agree = len(by_name[name]) == 1
        if value != default:
            pattern[_pattern_key(name if agree else full)] = value
    return pattern


def _pattern_key(name: str) -> str:
    """A pattern that PEFT and vLLM both match with this weight.

    PEFT matches keys with a parameter's name, `mlp.router.weight`; vLLM 0.33 matches them with its module's,
    `mlp.router` (`PEFTHelper.get_rank_and_scaling`), and falls back to `lora_alpha / r` if nothing matches. The
    experts' projections are named alike by both.
    """
    return f"{name.removesuffix('.weight')}(\\.weight)?" if name.endswith(".weight") else name


def _plain_number(value: float) -> Number:
    """32.0 as 32: PEFT's own files hold integers where they can."""
    return int(value) if value == int(value) else value


# ---- sites from a file's header and its adapter_config.json


@dataclass(frozen=True)
class StoredSite:
    """One weight an adapter file updates.

    Attributes:
        layer: from 0.
        name: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `router`, `gate_up_proj` or `down_proj`.
        rank: r.
        scale: what b @ a is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA.
        num_experts: E; 0 for attention and the router.
        inputs, out: sizes of the weight (of one expert's).
        key_a, key_b: names in the file.
    """

    layer: int
    name: str
    rank: int
    scale: float
    num_experts: int
    inputs: int
    out: int
    key_a: str = ""
    key_b: str = ""

    @property
    def module(self) -> str:
        """Path of the weight in the model without `.weight`: `model.layers.0.mlp.experts.gate_up_proj`."""
        return module_path(self.layer, self.name)


def parse_sites(shapes: Mapping[str, tuple[int, ...]], config: PeftConfig, where: Path) -> tuple[StoredSite, ...]:
    """The sites of a file in PEFT's layout, by layer, in the order attention, router, experts.

    Args:
        shapes: of the file's tensors, from its header.
        config: the adapter_config.json beside it.
        where: the file, for messages.

    Raises:
        InputError: a key of another layout, a factor without its other half, or shapes that do not fit the ranks.
    """
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(
                f"{where} has {key}, which is not a key of PEFT's gpt-oss layout",
                fix=f"finetune adapter import {where.parent} --out NEW reads other layouts",
            )
        name = _name(int(match["layer"]), match["module"], config)
        pairs.setdefault((int(match["layer"]), name), {})[match["factor"]] = key
    if not pairs:
        raise InputError(f"{where} has no tensor")
    order = (*ATTENTION, ROUTER, *EXPERTS)
    sites = []
    for (layer, name), keys in sorted(pairs.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        if keys.keys() != {"A", "B"}:
            raise InputError(f"{where} has {next(iter(keys.values()))} without its other factor")
        sites.append(_site(layer, name, keys["A"], keys["B"], shapes, config, where))
    return tuple(sites)


def _name(layer: int, module: str, config: PeftConfig) -> str:
    """Our name of a module; with one expert parameter alone, PEFT calls it `experts.lora_*` whichever it is."""
    if module == "mlp.experts.base_layer":
        return "gate_up_proj"
    if module == "mlp.experts":
        gate_up, down = (config.targets_parameter(module_path(layer, name)) for name in EXPERTS)
        return "gate_up_proj" if gate_up and not down else "down_proj"
    return module.rpartition(".")[2]


def _site(
    layer: int,
    name: str,
    key_a: str,
    key_b: str,
    shapes: Mapping[str, tuple[int, ...]],
    config: PeftConfig,
    where: Path,
) -> StoredSite:
    path = module_path(layer, name)
    if name in ATTENTION and (setting := config.leaves_out(path, layer)):
        raise InputError(
            f"{where} has {key_a}, and {setting} in {CONFIG} leaves that module out",
            why="PEFT would ignore these tensors",
            fix="use the adapter_config.json that was written with the tensors",
        )
    if name == ROUTER and config.targets_parameter(f"{path}.weight"):
        path += ".weight"
    rank = config.rank(path)
    shape_a, shape_b = shapes[key_a], shapes[key_b]
    flat = len(shape_a) == 2 and len(shape_b) == 2
    rows = shape_a[0] if flat else 0
    if not flat or rows != shape_b[1] or rank < 1 or (rows % rank if name in EXPERTS else rows != rank):
        raise unfit_pair(where, key_a, key_b, shapes, rank)
    num_experts, scale = rows // rank if name in EXPERTS else 0, config.scale(path, rank)
    return StoredSite(layer, name, rank, scale, num_experts, shape_a[1], shape_b[0], key_a, key_b)


def unfit_pair(where: Path, key_a: str, key_b: str, shapes: Mapping[str, tuple[int, ...]], rank: int) -> InputError:
    """The error for two factors whose shapes do not fit the configured rank."""
    return InputError(
        f"{where}: {key_a} {list(shapes[key_a])} and {key_b} {list(shapes[key_b])} are no pair of rank {rank}",
        fix="use the adapter_config.json that was written with the tensors",
    )
