"""The adapter directory: `AdapterFile` reads one in PEFT's layout, `write_adapter` writes one.

Files: adapter_model.safetensors and adapter_config.json as PEFT has them (`finetune.adapters.layout`), and ours beside
them (`finetune.adapters.provenance`). Equal adapters give equal files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune import log
from finetune.adapters.config_file import CONFIG, PeftConfig, read_adapter_config
from finetune.adapters.layout import (
    StoredSite,
    factor_keys,
    flatten_a,
    flatten_b,
    lora_config_fields,
    parse_sites,
    site_strengths,
    unflatten,
)
from finetune.adapters.lora import Adapter, load_factors, router_bias_changes, stored_factors
from finetune.adapters.provenance import (
    PROVENANCE,
    BaseRecord,
    StorageChanges,
    read_provenance,
    read_router_bias,
    refuse_other_base,
    warn_other_storage,
    write_provenance,
    write_router_bias,
)
from finetune.config.schema import AdapterConfig
from finetune.errors import CheckError, InputError
from finetune.files import staged_directory, write_json
from finetune.kernels.experts import LoraFactors
from finetune.model.headers import DTYPE_BYTES, read_header
from finetune.model.nf4 import without_kernel_advice

WEIGHTS = "adapter_model.safetensors"
_UNSET: dict[str, object] = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "target_parameters": []}
_RECIPE_FIX = "make adapter.attention and adapter.experts in the recipe as they were when it was trained"


# ---- reading


@dataclass(frozen=True)
class AdapterFile:
    """An adapter directory in PEFT's layout, checked; no factor is in memory until it is read.

    Attributes:
        directory: of the files.
        config: its adapter_config.json.
        base: the base it was trained on; its identity is None without finetune.json.
        sites: the weights it updates, by layer.
        router_bias: changes of routers' biases by the tensor's name, float32 [E]; only merges use them.
    """

    directory: Path
    config: PeftConfig
    base: BaseRecord
    sites: tuple[StoredSite, ...]
    router_bias: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> AdapterFile:
        """Check an adapter directory from its JSON files and header.

        Args:
            directory: as `finetune train` writes it; `finetune adapter import` converts other layouts.

        Raises:
            InputError: files missing, damaged or not those that were written; keys of another layout; shapes that do
                not fit the ranks; DoRA, biases or fully trained modules, which nothing here supports.
        """
        if not directory.is_dir():
            raise InputError(f"no adapter directory {directory}")
        config, base = read_description(directory)
        if config.is_grouped_by_expert:
            raise InputError(
                f"{directory} has lora_B of experts stored expert after expert (lora_B_layout)",
                why="it is read in PEFT's order here, and would be another update",
                fix=f"finetune adapter import {directory} --out NEW, then use NEW",
            )
        if not (directory / WEIGHTS).is_file():
            raise InputError(f"{directory} lacks {WEIGHTS}", why="adapters are read from safetensors only")
        shapes = {name: entry.shape for name, entry in read_header(directory / WEIGHTS).items()}
        sites = parse_sites(shapes, config, directory / WEIGHTS)
        return cls(directory, config, base, sites, read_router_bias(directory))

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers it changes."""
        return sorted({site.layer for site in self.sites})

    @property
    def max_rank(self) -> int:
        """The highest rank of any site."""
        return max(site.rank for site in self.sites)

    def site(self, layer: int, name: str) -> StoredSite | None:
        """The site of a layer's weight; None if the adapter does not change it."""
        return next((site for site in self.sites if (site.layer, site.name) == (layer, name)), None)

    def read(self, site: StoredSite) -> LoraFactors:
        """Read one site's factors, float32.

        Raises:
            InputError: a value is not finite.
        """
        try:
            with safe_open(self.directory / WEIGHTS, framework="pt") as file:
                a, b = file.get_tensor(site.key_a).float(), file.get_tensor(site.key_b).float()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.directory / WEIGHTS} is damaged", why=str(error)) from error
        for key, factor in ((site.key_a, a), (site.key_b, b)):
            if not factor.isfinite().all():
                raise InputError(f"{self.directory / WEIGHTS}: {key} has values that are not finite")
        return LoraFactors(*unflatten(a, b, site.num_experts, site.rank), site.scale)

    def layer(self, number: int) -> dict[str, LoraFactors]:
        """All factors of one layer by weight name."""
        return {site.name: self.read(site) for site in self.sites if site.layer == number}


def read_description(directory: Path) -> tuple[PeftConfig, BaseRecord]:
    """adapter_config.json and the base it and finetune.json name; tensors are not looked at.

    Raises:
        InputError: they cannot be read, files are not those that were written, or nothing here supports the settings.
    """
    provenance = read_provenance(directory)
    if provenance is None:
        log.warning(f"{directory} has no {PROVENANCE}: whether it belongs to a base can be checked by shapes only")
    config = read_adapter_config(directory)
    base = provenance.base if provenance else BaseRecord()
    return config, replace(base, name=base.name or config.base_name, revision=base.revision or config.base_revision)


def read_adapter_into(
    directory: Path,
    adapter: Adapter,
    config: AdapterConfig,
    base_identity: str,
    base_storage: StorageChanges | None = None,
) -> None:
    """Fill an attached adapter from a directory that an adapter of the same recipe was written to.

    Args:
        directory: of the adapter.
        adapter: attached; its parameters are set, rounded to their dtype if that is narrower than the file's.
        config: the recipe's adapter part.
        base_identity, base_storage: of the base here.

    Raises:
        InputError: files are missing or damaged, ranks, alphas or targets differ from the recipe's, the adapter
            belongs to another base, or a factor has another shape or is not finite.
    """
    file = AdapterFile.open(directory)
    if (directory / PROVENANCE).is_file():
        refuse_other_base(file.base, base_identity, directory)
        warn_other_storage(file.base, base_storage or {}, directory)
    _check_config(file, adapter_config_fields(adapter, config))
    _check_tensors(file, adapter)
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        expected = stored_factors(site, module)
        stored = {name: file.read(found) for name in expected if (found := file.site(site.layer, name))}
        for name, factors in stored.items():
            shapes = [(list(f.a.shape), list(f.b.shape)) for f in (factors, expected[name])]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"{directory}: {site.module}: {name} has shapes {shapes[0]}, the base needs {shapes[1]}"
                )
        try:
            load_factors(site, module, stored)
        except ValueError as error:
            raise InputError(
                f"{directory} does not fit the recipe at {site.module}: {error}",
                fix="make adapter.experts.select, .share and .rank_by in the recipe as they were when it was trained; "
                "RUN/experts.json gives a run's own choice to select and rank_by",
            ) from error
    load_router_bias(adapter, file)


def _check_config(file: AdapterFile, fields: Mapping[str, object]) -> None:
    # What a recipe does not set must not be set there either.
    for name, wanted in (_UNSET | dict(fields)).items():
        found = file.config.settings.get(name) or type(wanted)()
        same = set(found) == set(wanted) if isinstance(wanted, list) and isinstance(found, list) else found == wanted
        if not same:
            raise InputError(
                f"{file.directory / CONFIG}: {name} is {found!r}, the recipe's adapter has {wanted!r}", fix=_RECIPE_FIX
            )


def _check_tensors(file: AdapterFile, adapter: Adapter) -> None:
    wanted = {key for site in adapter.sites for name in site.weights for key in factor_keys(site.layer, name)}
    stored = {key for site in file.sites for key in (site.key_a, site.key_b)}
    missing, unexpected = sorted(wanted - stored), sorted(stored - wanted)
    if missing or unexpected:
        raise InputError(
            f"{file.directory} does not have the tensors of this recipe's adapter",
            why=f"missing: {missing[:3] or 'none'}; unexpected: {unexpected[:3] or 'none'}",
            fix=_RECIPE_FIX,
        )
    itemsize = min(parameter.element_size() for parameter in adapter.parameters().values())
    entries = read_header(file.directory / WEIGHTS).values()
    if any(DTYPE_BYTES.get(entry.dtype, 0) > itemsize for entry in entries):
        log.warning(f"{file.directory}: its factors are rounded to the recipe's adapter.dtype, which is narrower")


# ---- writing


def write_adapter(
    directory: Path,
    adapter: Adapter,
    config: AdapterConfig,
    base: BaseRecord,
) -> None:
    """Write a trained adapter in PEFT's layout, whole or not at all.

    Args:
        directory: must not exist.
        adapter: its current parameters are written.
        config: the recipe's adapter part.
        base: the base it was trained on.

    Raises:
        CheckError: a factor is not finite, or every B is zero (nothing was trained).
        InputError: the directory exists.
        MachineError: it cannot be written.
    """
    tensors = adapter_tensors(adapter)
    _check_trained(tensors)
    fields = adapter_config_fields(adapter, config)
    write_directory(directory, tensors, fields, base, router_bias=router_bias_changes(adapter))


def write_directory(
    directory: Path,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    base: BaseRecord,
    extra: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] | None = None,
    router_bias: Mapping[str, Tensor] | None = None,
) -> None:
    """Write tensors, adapter_config.json and finetune.json, whole or not at all; equal inputs give equal bytes.

    Args:
        directory: must not exist.
        tensors: by PEFT's keys.
        fields: of PEFT's `LoraConfig`, as `lora_config_fields` makes them.
        base: the base it belongs to.
        extra: what else finetune.json records.
        finish: called with the unfinished directory before it gets its name; what it raises leaves nothing behind.
        router_bias: changes of routers' biases, which go into a file of their own.

    Raises:
        InputError: the directory exists.
        MachineError: it cannot be written.
    """
    with staged_directory(directory, "the adapter", file_mode=0o644) as staging:
        save_file(dict(tensors), staging / WEIGHTS, metadata={"format": "pt"})
        write_json(staging / CONFIG, _peft_config(fields, base))
        write_router_bias(staging, router_bias or {})
        write_provenance(staging, base.as_provenance() | dict(extra or {}))
        if finish is not None:
            finish(staging)


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All factors of a live adapter by PEFT's keys, on the CPU."""
    sites = zip(adapter.sites, adapter.modules, strict=True)
    return peft_tensors((site.layer, name, f) for site, m in sites for name, f in stored_factors(site, m).items())


def peft_tensors(factors: Iterable[tuple[int, str, LoraFactors]]) -> dict[str, Tensor]:
    """Factors (layer, weight name, factors of all experts) by PEFT's keys, in PEFT's shapes, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for layer, name, found in factors:
        key_a, key_b = factor_keys(layer, name)
        tensors[key_a], tensors[key_b] = flatten_a(found.a.cpu()), flatten_b(found.b.cpu())
    return tensors


def adapter_config_fields(adapter: Adapter, config: AdapterConfig) -> dict[str, object]:
    """The fields of PEFT's `LoraConfig` for a live adapter of a recipe."""
    weights = site_strengths(adapter.sites)
    return lora_config_fields(weights, every_layer=config.layers is None, rslora=config.rslora)


def _peft_config(fields: Mapping[str, Any], base: BaseRecord) -> dict[str, Any]:
    """adapter_config.json with every field of PEFT's own class, sorted."""
    without_kernel_advice()  # PEFT imports bitsandbytes where that is installed
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
        revision=base.revision,
        inference_mode=True,
        **fields,
    ).to_dict()
    # PEFT stores targets as a set, whose order changes from process to process.
    config |= {key: value for key, value in fields.items() if isinstance(value, list)}
    return dict(sorted(config.items()))


def _check_trained(tensors: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckError(f"the adapter is not finite: {', '.join(broken[:3])}")
    pairs = ((tensor, tensors[key.replace("lora_B", "lora_A")]) for key, tensor in tensors.items() if "lora_B" in key)
    if not any(b.count_nonzero() and a.count_nonzero() for b, a in pairs):
        raise CheckError("the adapter is empty: every lora_B is zero", why="no update reached it")


@torch.no_grad()
def load_router_bias(adapter: Adapter, file: AdapterFile) -> None:
    """Set the changes of routers' biases from a file.

    Raises:
        InputError: the file changes biases that are not trained here, or lacks those that are.
    """
    here = router_bias_changes(adapter).keys()
    if file.router_bias.keys() != here:
        raise InputError(
            f"{file.directory} {'lacks' if here else 'has'} changes of routers' biases, the recipe "
            f"{'trains them' if here else 'does not train them'}",
            fix="make adapter.router.mode in the recipe as it was when it was trained",
        )
    for name, parameter in adapter.parameters().items():
        if name.endswith(".bias_change"):
            parameter.copy_(file.router_bias[name.removesuffix("_change")])
