"""An adapter as every exporter sees it: sites with factors in our shapes, read from a PEFT directory when asked for.

Shape legend: E experts, r rank. Attention and router: a [r, in], b [out, r]. Experts: a [E, r, in], b [E, out, r].
The update of a weight [out, in] (of one expert) is scale · b @ a; gate and up interleave along out, even is gate.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import __version__, log
from finetune.adapters.config_file import CONFIG, read_adapter_config
from finetune.adapters.layout import from_peft, peft_config_fields, peft_keys, to_peft
from finetune.adapters.lora import Adapter, ExpertLora, LoraModule, LoraRouter, lora_parameters
from finetune.adapters.peft_package import LoraConfig
from finetune.adapters.sites import Site
from finetune.config.schema import AdapterConfig
from finetune.errors import CheckError, InputError
from finetune.files import sha256_of, staged_directory
from finetune.model.headers import plain_file_name, read_header

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_up_proj", "down_proj")
ROUTER = "router"
_KEY = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(?P<layer>\d+)\."
    r"(?P<module>self_attn\.[qkvo]_proj|mlp\.router|mlp\.experts\.base_layer|mlp\.experts)"
    r"\.lora_(?P<factor>[AB])\.weight"
)


@dataclass(frozen=True)
class StoredSite:
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
class AdapterFile:
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
    sites: tuple[StoredSite, ...]
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

    def site(self, layer: int, name: str) -> StoredSite | None:
        """The site of a layer's weight, None if the adapter leaves it alone."""
        return next((site for site in self.sites if (site.layer, site.name) == (layer, name)), None)

    def read(self, site: StoredSite) -> Factors:
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


def open_adapter(directory: Path) -> AdapterFile:
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
    return AdapterFile(
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


def _sites(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: Path) -> tuple[StoredSite, ...]:
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
) -> StoredSite:
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
    return StoredSite(layer, name, rank, scale, num_experts, shape_a[1], shape_b[0], key_a, key_b)


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


# Between what is trained and what files hold: a pair of factors for every site, for every expert.
#
# Files of others know neither a factor that experts share, nor experts without an update, nor a router trained whole.
# So a shared factor is written for each expert, an expert that is not adapted gets zeros, and the change of a whole
# router's weight becomes the product of a unit matrix (over the scale) and itself. The change of its bias has no place
# there at all: it goes into a JSON file beside, and merges carry it.
#
# Shape legend: E experts, L rank, D hidden.

ROUTER_BIAS = "router_bias.json"  # not safetensors: SGLang reads every such file of a directory


def stored_factors(site: Site, module: LoraModule) -> dict[str, Tensor]:
    """A site's factors as files hold them, detached: of all E experts, and of a whole router a [E, D], b [E, E]."""
    if isinstance(module, ExpertLora):
        return {name: module.full_factor(name).detach() for name in lora_parameters(module)}
    if isinstance(module, LoraRouter) and module.whole:
        change = module.weight_change.detach().float()
        return {"lora_a": change, "lora_b": torch.eye(len(change), device=change.device) / site.scale}
    return {name: parameter.detach() for name, parameter in lora_parameters(module).items()}


@torch.no_grad()
def fill(site: Site, module: LoraModule, stored: Mapping[str, Tensor]) -> None:
    """Set a site's parameters from factors as files hold them: the inverse of `stored_factors`.

    Raises:
        ValueError: an expert that is not adapted here has an update, or one beyond its rank, or a factor that is shared
            here differs among experts.
    """
    if isinstance(module, LoraRouter) and module.whole:
        module.weight_change.copy_(stored["lora_b"].float() @ stored["lora_a"].float() * site.scale)
        return
    for name, parameter in lora_parameters(module).items():
        factor = stored[name]
        parameter.copy_(module.from_full_factor(name, factor) if isinstance(module, ExpertLora) else factor)


def router_bias_changes(adapter: Adapter) -> dict[str, Tensor]:
    """The changes of routers' biases by the tensor's name, float32 [E] each; empty unless routers are trained whole."""
    return {
        f"{site.module}.bias": module.bias_change.detach().float().cpu()
        for site, module in zip(adapter.sites, adapter.modules, strict=True)
        if isinstance(module, LoraRouter) and module.whole
    }


def write_router_bias(directory: Path, changes: Mapping[str, Tensor]) -> None:
    """Write `router_bias.json` into an adapter directory; nothing if there is no change."""
    if changes:
        content = {name: change.tolist() for name, change in changes.items()}
        (directory / ROUTER_BIAS).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_router_bias(directory: Path) -> dict[str, Tensor]:
    """Read `router_bias.json`; empty without it.

    Raises:
        InputError: it cannot be read, or a value is not finite.
    """
    path = directory / ROUTER_BIAS
    if not path.is_file():
        return {}
    try:
        changes = {str(name): torch.tensor(values, dtype=torch.float32) for name, values in _object(path).items()}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from error
    for name, change in changes.items():
        if change.dim() != 1 or not change.isfinite().all():
            raise InputError(f"{path}: {name} is not a list of finite numbers")
    return changes


def _object(path: Path) -> dict[str, list[float]]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError("it holds no names")
    return content


# Writing and reading adapter directories, so that what is on disk is whole, belongs to this base, and is finite.

WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "finetune.json"  # ours: PEFT, vLLM and SGLang ignore files they do not know


def write_adapter(
    directory: Path,
    adapter: Adapter,
    config: AdapterConfig,
    *,
    base_name: str,
    base_revision: str | None,
    base_identity: str,
    base_held_as: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter in PEFT's layout, whole or not at all.

    Args:
        directory: must not exist.
        adapter: its current parameters are written.
        config: the recipe's adapter part.
        base_name, base_revision: where to get the base, for whoever loads the adapter.
        base_identity: which base it belongs to.
        base_held_as: parts of it that were rounded further, see `Base.held_as`; recorded if there are any.

    Raises:
        CheckError: a factor is not finite, or every B is zero (nothing was trained).
        InputError: the directory exists.
        MachineError: it cannot be written.
    """
    tensors = peft_tensors(adapter)
    _check_trained(tensors)
    facts: dict[str, Any] = {"base_name": base_name, "base_revision": base_revision, "base_identity": base_identity}
    if base_held_as:
        facts["base_held_as"] = dict(base_held_as)
    fields = peft_config_fields(config, *_ranks(adapter))
    write_peft_directory(directory, tensors, fields, facts, router_bias=router_bias_changes(adapter))


def write_peft_directory(
    directory: Path,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    facts: Mapping[str, Any],
    finish: Callable[[Path], None] | None = None,
    router_bias: Mapping[str, Tensor] | None = None,
) -> None:
    """Write tensors, adapter_config.json and finetune.json, whole or not at all; equal inputs give equal bytes.

    Args:
        directory: must not exist.
        tensors: by PEFT's keys.
        fields: of PEFT's `LoraConfig`, as `peft_config_fields` makes them.
        facts: `base_name`, `base_revision`, `base_identity` (None if not known), and whatever else should be kept.
        finish: called with the unfinished directory before it gets its name; what it raises leaves nothing behind.
        router_bias: changes of routers' biases, which go into a file of their own.

    Raises:
        InputError: the directory exists.
        MachineError: it cannot be written.
    """
    with staged_adapter(directory) as staging:
        save_file(dict(tensors), staging / WEIGHTS, metadata={"format": "pt"})
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=facts.get("base_name"),
            revision=facts.get("base_revision"),
            inference_mode=True,
            **fields,
        ).to_dict()
        # PEFT holds targets as a set, whose order changes from process to process.
        config |= {key: value for key, value in fields.items() if isinstance(value, list)}
        write_facts(staging / CONFIG, dict(sorted(config.items())))
        write_router_bias(staging, router_bias or {})
        files = {path.name: sha256_of(path) for path in sorted(staging.iterdir())}
        write_facts(staging / PROVENANCE, {"written_by": f"gpt-oss-finetune {__version__}", **facts, "files": files})
        if finish is not None:
            finish(staging)


def staged_adapter(directory: Path) -> AbstractContextManager[Path]:
    """Give a directory to write an adapter into, which gets its final name at the end of the block.

    Raises:
        InputError: the directory exists.
        MachineError: it cannot be written, the disk is full.
    """
    return staged_directory(directory, "the adapter", file_mode=0o644)


def write_facts(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as every file beside an adapter has it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All factors under PEFT's keys, on the CPU."""
    return {
        peft_keys(site)[name]: to_peft(name, factor.cpu())
        for site, module in zip(adapter.sites, adapter.modules, strict=True)
        for name, factor in stored_factors(site, module).items()
    }


def read_adapter_into(
    directory: Path,
    adapter: Adapter,
    config: AdapterConfig,
    base_identity: str,
    base_held_as: Mapping[str, Any] | None = None,
) -> None:
    """Fill an attached adapter from a directory in PEFT's layout.

    Args:
        directory: of the adapter.
        adapter: attached; its parameters are set, rounded to their dtype if that is narrower than the file's.
        config: the recipe's adapter part.
        base_identity, base_held_as: the base here, see `Base`.

    Raises:
        InputError: files are missing or damaged, ranks, alphas or targets differ from the recipe's, the adapter
            belongs to another base, or a factor has another shape or is not finite.
    """
    _check_provenance(directory, base_identity, base_held_as or {})
    _check_config(directory, peft_config_fields(config, *_ranks(adapter)))
    stored = _read_tensors(directory)
    wanted = {key for site in adapter.sites for key in peft_keys(site).values()}
    missing, unexpected = sorted(wanted - stored.keys()), sorted(stored.keys() - wanted)
    if missing or unexpected:
        raise InputError(
            f"{directory} does not hold the tensors of this recipe's adapter",
            why=f"missing: {missing[:3] or 'none'}; unexpected: {unexpected[:3] or 'none'}",
            fix="make adapter.attention and adapter.experts in the recipe as they were when it was trained",
        )
    itemsize = min(parameter.element_size() for parameter in adapter.parameters().values())
    if any(factor.element_size() > itemsize for factor in stored.values()):
        log.warning(f"{directory}: its factors are rounded to the recipe's adapter.dtype, which is narrower")
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        factors: dict[str, Tensor] = {}
        shapes = {name: factor.shape for name, factor in stored_factors(site, module).items()}
        for name, key in peft_keys(site).items():
            try:
                factors[name] = from_peft(name, stored[key], shapes[name])
            except ValueError as error:
                raise InputError(f"{directory / WEIGHTS}: {key}: {error}") from error
            if not factors[name].isfinite().all():
                raise InputError(f"{directory / WEIGHTS}: {key} holds values that are not finite")
        try:
            fill(site, module, factors)
        except ValueError as error:
            raise InputError(
                f"{directory} does not fit the recipe at {site.module}: {error}",
                fix="make adapter.experts.select, .share and .rank_by in the recipe as they were when it was trained; "
                "RUN/experts.json gives a run's own choice to select and rank_by",
            ) from error
    _fill_router_bias(directory, adapter)


@torch.no_grad()
def _fill_router_bias(directory: Path, adapter: Adapter) -> None:
    changes = read_router_bias(directory)
    here = {name for name in router_bias_changes(adapter)}
    if changes.keys() != here:
        raise InputError(
            f"{directory} {'lacks' if here else 'has'} changes of routers' biases, the recipe "
            f"{'trains them' if here else 'does not train them'}",
            fix="make adapter.router.mode in the recipe as it was when it was trained",
        )
    for name, parameter in adapter.parameters().items():
        if name.endswith(".bias_change"):
            parameter.copy_(changes[name.removesuffix("_change")])


def _ranks(adapter: Adapter) -> tuple[int, int]:
    """Ranks that files have and a recipe does not say: of a router trained whole, of experts whose ranks differ."""
    router = next((site.rank for site in adapter.sites if site.whole), 0)
    return router, next((site.rank for site in adapter.sites if site.ranks is not None), 0)


def _check_trained(tensors: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckError(f"the adapter is not finite: {', '.join(broken[:3])}")
    pairs = ((tensor, tensors[key.replace("lora_B", "lora_A")]) for key, tensor in tensors.items() if "lora_B" in key)
    if not any(b.count_nonzero() and a.count_nonzero() for b, a in pairs):
        raise CheckError("the adapter is empty: every lora_B is zero", why="no update reached it")


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """What `finetune.json` says of an adapter, after comparing the files with it.

    Returns:
        `base_name`, `base_revision`, `base_identity`, `files` and `written_by`, and `base_held_as` if the base was
        rounded further than its checkpoint; None without the file.

    Raises:
        InputError: no directory, the file cannot be read, or another file is missing or not the one that was written.
    """
    if not directory.is_dir():
        raise InputError(f"no adapter directory {directory}")
    path = directory / PROVENANCE
    if not path.exists():
        return None
    try:
        provenance: dict[str, Any] = json.loads(path.read_text())
        files = dict(provenance["files"])
        _check_facts(provenance)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from error
    for name, digest in files.items():
        if not (directory / plain_file_name(name, path)).is_file():
            raise InputError(f"{directory} lacks {name}")
        if sha256_of(directory / name) != digest:
            raise InputError(f"{directory / name} is not the file that was written", why="its sha256 differs")
    return provenance


def _check_facts(provenance: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError if facts that are used are not what we write."""
    texts = (provenance["base_identity"], provenance.get("base_name"), provenance.get("base_revision"))
    if not all(isinstance(text, str | None) for text in texts):
        raise ValueError("the base's name, revision and identity must be text")
    for held in (provenance.get("base_held_as") or {}).values():
        str(held["format"]), float(held["relative_rms"])


def refuse_other_base(provenance: Mapping[str, Any], base_identity: str, where: Path) -> None:
    """Raise InputError if an adapter was trained on another base than `base_identity`; warn if that is not known."""
    written_for = provenance["base_identity"]
    if written_for is None:
        log.warning(f"{where} was imported without its base: whether it belongs to this one cannot be checked")
    elif written_for != base_identity:
        raise InputError(
            f"{where} was trained on another base",
            why=f"it belongs to {provenance.get('base_name')} ({written_for[:12]}), this one is {base_identity[:12]}",
            fix="set model.path (and model.revision) to the base it was trained on",
        )


def warn_held_as(provenance: Mapping[str, Any], held_as: Mapping[str, Any], where: Path) -> None:
    """Warn if an adapter was trained over other values than those it is used with now, of one and the same checkpoint.

    Args:
        provenance: its finetune.json.
        held_as: how the base is held now; empty: as the checkpoint has it.
        where: the adapter, for the message.
    """
    trained = provenance.get("base_held_as") or {}
    formats, now = ({part: held["format"] for part, held in facts.items()} for facts in (trained, held_as))
    if formats == now:
        return
    words = [f"{part} in {held['format']} (off by {held['relative_rms']:.1%})" for part, held in trained.items()]
    here = ", ".join(f"{part} in {form}" for part, form in now.items()) or "the checkpoint's own values"
    log.warning(
        f"{where} was trained over {', '.join(words) or 'the checkpoint as it is'}, and is used with {here}: "
        "that is another function, and its evaluation says nothing about it; evaluate again"
    )


def _check_provenance(directory: Path, base_identity: str, base_held_as: Mapping[str, Any]) -> None:
    provenance = read_provenance(directory)
    if provenance is None:
        log.warning(f"{directory} has no {PROVENANCE}: whether it belongs to this base cannot be checked")
        return
    refuse_other_base(provenance, base_identity, directory)
    warn_held_as(provenance, base_held_as, directory)


def _check_config(directory: Path, fields: Mapping[str, Any]) -> None:
    path = directory / CONFIG
    stored = read_adapter_config(path)
    # What a recipe does not set must not be set there either.
    unset: dict[str, Any] = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "target_parameters": []}
    for field, wanted in {**unset, **fields}.items():
        found = stored.get(field) or type(wanted)()
        same = set(found) == set(wanted) if isinstance(wanted, list) else found == wanted
        if not same:
            raise InputError(
                f"{path}: {field} is {found!r}, the recipe's adapter has {wanted!r}",
                fix="make adapter.attention and adapter.experts in the recipe as they were when it was trained",
            )


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{directory} lacks {WEIGHTS}", why="adapters are read from safetensors only") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged", why=str(error)) from error
