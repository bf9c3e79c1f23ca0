"""An adapter as every exporter sees it: sites with factors in our shapes, read from a PEFT directory when asked for.

Shape legend: E experts, r rank. Attention and router: a [r, in], b [out, r]. Experts: a [E, r, in], b [E, out, r].
The update of a weight [out, in] (of one expert) is scale · b @ a; gate and up interleave along out, even is gate.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from finetune import log
from finetune.adapters.config_file import read_adapter_config
from finetune.adapters.files import CONFIG, PROVENANCE, WEIGHTS, read_provenance
from finetune.adapters.stored import read_router_bias
from finetune.errors import InputError
from finetune.model.headers import read_header

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_up_proj", "down_proj")
ROUTER = "router"
_KEY = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(?P<layer>\d+)\."
    r"(?P<module>self_attn\.[qkvo]_proj|mlp\.router|mlp\.experts\.base_layer|mlp\.experts)"
    r"\.lora_(?P<factor>[AB])\.weight"
)


@dataclass(frozen=True)
class SourceSite:
    """One weight an adapter changes.

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
    key_a: str
    key_b: str

    @property
    def module(self) -> str:
        """Path of the weight in the model without `.weight`: `model.layers.0.mlp.experts.gate_up_proj`."""
        return module_path(self.layer, self.name)


@dataclass(frozen=True)
class Factors:
    """A site's factors, float32, and the scale of their product."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The update, float32 [out, in] or [E, out, in]."""
        return (self.b @ self.a).mul_(self.scale)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter directory in PEFT's layout, checked; no factor is in memory until it is read.

    Attributes:
        directory: where it lies.
        config: its adapter_config.json.
        base_name, base_revision, base_identity: the base it was trained on; identity is None without finetune.json.
        sites: what it changes, by layer.
        base_held_as: parts of the base that were rounded further while it was trained, see `Base.held_as`.
        router_bias: changes of routers' biases by the tensor's name, float32 [E]; only merges carry them.
    """

    directory: Path
    config: dict[str, Any]
    base_name: str | None
    base_revision: str | None
    base_identity: str | None
    sites: tuple[SourceSite, ...]
    base_held_as: dict[str, Any] = dataclasses.field(default_factory=dict)
    router_bias: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def base_facts(self) -> dict[str, Any]:
        """What a finetune.json says of the base."""
        facts: dict[str, Any] = {
            "base_name": self.base_name,
            "base_revision": self.base_revision,
            "base_identity": self.base_identity,
        }
        return facts | ({"base_held_as": self.base_held_as} if self.base_held_as else {})

    def site(self, layer: int, name: str) -> SourceSite | None:
        """The site of a layer's weight, None if the adapter leaves it alone."""
        return next((site for site in self.sites if (site.layer, site.name) == (layer, name)), None)

    def read(self, site: SourceSite) -> Factors:
        """Read one site.

        Raises:
            InputError: a value is not finite.
        """
        with safe_open(self.directory / WEIGHTS, framework="pt") as file:
            a, b = file.get_tensor(site.key_a).float(), file.get_tensor(site.key_b).float()
        for key, factor in ((site.key_a, a), (site.key_b, b)):
            if not factor.isfinite().all():
                raise InputError(f"{self.directory / WEIGHTS}: {key} holds values that are not finite")
        if site.num_experts:
            a = a.reshape(site.num_experts, site.rank, -1)
            b = b.reshape(len(b), site.rank, site.num_experts).permute(2, 0, 1).contiguous()
        return Factors(a, b, site.scale)

    def layer(self, number: int) -> dict[str, Factors]:
        """All factors of one layer by site name."""
        return {site.name: self.read(site) for site in self.sites if site.layer == number}


def open_adapter(directory: Path) -> AdapterSource:
    """Check an adapter directory from its JSON files and header.

    Args:
        directory: in PEFT's layout, as `finetune train` writes it; `finetune adapter import` brings others into it.

    Raises:
        InputError: files missing, damaged or not those that were written; keys of another layout; shapes that do not
            fit the ranks; DoRA, biases or fully trained modules, which no merge here knows.
    """
    if not directory.is_dir():
        raise InputError(f"no adapter directory {directory}")
    provenance = read_provenance(directory)
    if provenance is None:
        log.warning(f"{directory} has no {PROVENANCE}: whether it belongs to a base can be checked by shapes only")
    config = read_adapter_config(directory / CONFIG)
    refuse_unsupported(config, directory)
    if not (directory / WEIGHTS).is_file():
        raise InputError(f"{directory} lacks {WEIGHTS}", why="adapters are read from safetensors only")
    shapes = {name: entry.shape for name, entry in read_header(directory / WEIGHTS).items()}
    sites = _sites(shapes, config, directory / WEIGHTS)
    facts = provenance or {}
    return AdapterSource(
        directory,
        config,
        facts.get("base_name") or config.get("base_model_name_or_path"),
        facts.get("base_revision") or config.get("revision"),
        facts.get("base_identity"),
        sites,
        facts.get("base_held_as") or {},
        read_router_bias(directory),
    )


def module_path(layer: int, name: str) -> str:
    """Path of a site's weight in the model, without `.weight`.

    >>> module_path(3, "down_proj")
    'model.layers.3.mlp.experts.down_proj'
    """
    part = "self_attn" if name in ATTENTION else "mlp" if name == ROUTER else "mlp.experts"
    return f"model.layers.{layer}.{part}.{name}"


def refuse_unsupported(config: Mapping[str, Any], directory: Path) -> None:
    """Raise InputError for what an adapter_config.json asks for and no export here carries."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"{directory}: peft_type is {config.get('peft_type')!r}, only LORA can be exported")
    for key, harmless in (
        ("use_dora", (None, False)),
        ("bias", (None, "none")),
        ("lora_bias", (None, False)),
        ("modules_to_save", (None, [])),
        ("fan_in_fan_out", (None, False)),
    ):
        if config.get(key) not in harmless:
            raise InputError(f"{directory}: {key} is {config[key]!r}, which no export here carries")


def _sites(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: Path) -> tuple[SourceSite, ...]:
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(
                f"{where} holds {key}, which is not a key of PEFT's gpt-oss layout",
                fix="`finetune adapter import` reads other layouts",
            )
        name = _name(int(match["layer"]), match["module"], config)
        pairs.setdefault((int(match["layer"]), name), {})[match["factor"]] = key
    if not pairs:
        raise InputError(f"{where} holds no tensor")
    order = (*ATTENTION, ROUTER, *EXPERTS)
    sites = []
    for (layer, name), keys in sorted(pairs.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        if keys.keys() != {"A", "B"}:
            raise InputError(f"{where} holds {next(iter(keys.values()))} without its other factor")
        sites.append(_site(layer, name, keys["A"], keys["B"], shapes, config, where))
    return tuple(sites)


def _name(layer: int, module: str, config: Mapping[str, Any]) -> str:
    """Our name of a module; with one expert parameter alone, PEFT calls it `experts.lora_*` whichever it is."""
    if module == "mlp.experts.base_layer":
        return "gate_up_proj"
    if module == "mlp.experts":
        alone = _targets(config, layer, "gate_up_proj") and not _targets(config, layer, "down_proj")
        return "gate_up_proj" if alone else "down_proj"
    return module.rpartition(".")[2]


def _targets(config: Mapping[str, Any], layer: int, name: str) -> bool:
    """Whether a layer's expert parameter is targeted, by its full name or by the end of it (as PEFT matches)."""
    path = module_path(layer, name)
    return any(f".{path}".endswith(f".{target}") for target in config.get("target_parameters") or ())


def _site(
    layer: int,
    name: str,
    key_a: str,
    key_b: str,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    where: Path,
) -> SourceSite:
    path = module_path(layer, name)
    if name == ROUTER and _targets_parameter(config, "router.weight"):
        path += ".weight"
    rank = int(patterned(config, "rank_pattern", "r", path))
    alpha = float(patterned(config, "alpha_pattern", "lora_alpha", path))
    shape_a, shape_b = shapes[key_a], shapes[key_b]
    flat = len(shape_a) == 2 and len(shape_b) == 2
    rows = shape_a[0] if flat else 0
    if not flat or rows != shape_b[1] or rank < 1 or (rows % rank if name in EXPERTS else rows != rank):
        raise InputError(
            f"{where}: {key_a} {list(shape_a)} and {key_b} {list(shape_b)} are no pair of rank {rank}",
            fix="use the adapter_config.json that was written with the tensors",
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    num_experts = rows // rank if name in EXPERTS else 0
    return SourceSite(layer, name, rank, scale, num_experts, shape_a[1], shape_b[0], key_a, key_b)


def _targets_parameter(config: Mapping[str, Any], suffix: str) -> bool:
    return any(str(target).endswith(suffix) for target in config.get("target_parameters") or ())


def patterned(config: Mapping[str, Any], patterns: str, default: str, path: str) -> Any:
    """A setting of one site: the first pattern whose regular expression ends the path (as in PEFT), or the default."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    if not isinstance(config.get(default), int | float) or isinstance(config[default], bool):
        raise InputError(f"adapter_config.json: {default} is {config.get(default)!r}, not a number")
    return config[default]
