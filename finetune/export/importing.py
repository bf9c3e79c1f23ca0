"""Import adapters of other tools: PEFT of any version, factors for each expert, or our compact form."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from finetune import log
from finetune.adapters.compact import COMPACT_WEIGHTS, is_compact, read_compact
from finetune.adapters.config_file import PeftConfig
from finetune.adapters.layout import EXPERTS, StoredSite
from finetune.adapters.store import WEIGHTS, AdapterFile, read_description, write_directory
from finetune.arch import Arch
from finetune.errors import InputError
from finetune.export.base import check_base, check_fits, find_base, known_arch
from finetune.export.factors import SWAPPING_RELEASE, is_swapped, swapped_back
from finetune.export.options import ExportOptions
from finetune.export.targets.peft import adapts_every_layer, peft_contents
from finetune.export.targets.sglang import PerExpertFile, has_per_expert_keys
from finetune.files import refuse_existing, sha256_of
from finetune.kernels.experts import LoraFactors
from finetune.model.checkpoint import Checkpoint
from finetune.model.headers import join, read_header
from finetune.model.hub import BaseLocation

_NOT_SAFETENSORS = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_TOKENIZER_FILES = re.compile(r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template)\..*")


@dataclass(frozen=True)
class GivenBase:
    """A base named on the command line, opened."""

    location: BaseLocation
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Imported:
    """An adapter in memory, in our orientation.

    Attributes:
        file: what it was read from; its sites are those of `layers`.
        base: the base that was given with it.
        arch: of its base, if known.
        layers: layer number -> weight name -> factors.
        layout: of the file, for the message.
        rslora: scales are to be written as alpha / sqrt(rank).
    """

    file: AdapterFile
    base: GivenBase | None
    arch: Arch | None
    layers: dict[int, dict[str, LoraFactors]]
    layout: str
    rslora: bool


def import_adapter(directory: Path, out: Path, options: ExportOptions) -> None:
    """Write an adapter of another tool in our PEFT layout.

    Args:
        directory: of the adapter.
        out: must not exist.
        options: `base` and `revision`: the base it belongs to, to check it and to record its identity.

    Raises:
        ConfigError: `out` exists.
        InputError: it cannot be read, its layout is not known, or it does not fit the base.
    """
    refuse_existing(out)
    adapter = _read(directory, options)
    base = adapter.file.base
    if adapter.arch is not None:
        check_fits(adapter.arch, adapter.file)
    if adapter.base is not None:
        location = adapter.base.location
        identity = check_base(adapter.base.checkpoint, adapter.file)
        base = replace(base, name=location.name, revision=location.revision, identity=identity)
    elif base.identity is None:
        log.warning("which base it belongs to is not recorded; --base BASE checks it and records it")
    tensors, fields = peft_contents(
        sorted(adapter.layers.items()),
        rslora=adapter.rslora,
        every_layer=adapts_every_layer(adapter.file, adapter.arch),
    )
    source = directory / (COMPACT_WEIGHTS if is_compact(directory) else WEIGHTS)
    imported_from = {"imported_from": sha256_of(source)}
    write_directory(out, tensors, fields, base, imported_from, router_bias=adapter.file.router_bias)
    log.info(f"read {adapter.layout}: {len(adapter.file.sites)} sites in {len(adapter.layers)} layers")
    left_out = sorted(path.name for path in directory.iterdir() if _TOKENIZER_FILES.fullmatch(path.name))
    if left_out:
        log.warning(f"left out: {join(left_out)}; an adapter's tokens are its base's")


def _read(directory: Path, options: ExportOptions) -> Imported:
    if not directory.is_dir():
        raise InputError(f"no adapter directory {directory}")
    if is_compact(directory):
        return _read_compact(directory, options)
    if not (directory / WEIGHTS).is_file():
        others = [name for name in _NOT_SAFETENSORS if (directory / name).is_file()]
        raise InputError(
            f"{directory} lacks {WEIGHTS}",
            why=f"it has {others[0]}, a format that can run code when it is read" if others else None,
            fix="save it as safetensors with the PEFT that wrote it" if others else "give an adapter's own directory",
        )
    if has_per_expert_keys(read_header(directory / WEIGHTS)):
        return _read_per_expert(directory, options)
    file = AdapterFile.open(directory)
    base, arch = _base(file, options)
    layers = {number: file.layer(number) for number in file.layers}
    layout = f"PEFT {file.config.peft_version or 'of an unknown version'}"
    if is_swapped(file, arch):
        layers = {
            number: {name: swapped_back(factors) if name in EXPERTS else factors for name, factors in layer.items()}
            for number, layer in layers.items()
        }
        sites = tuple(replace(s, inputs=s.out, out=s.inputs) if s.name in EXPERTS else s for s in file.sites)
        file = replace(file, sites=sites)
        layout += f", expert factors swapped as {SWAPPING_RELEASE} did, turned the right way round"
    return Imported(file, base, arch, layers, layout, file.config.use_rslora)


def _read_per_expert(directory: Path, options: ExportOptions) -> Imported:
    config, recorded = read_description(directory)
    file = AdapterFile(directory, config, recorded, sites=())
    base, arch = _base(file, options)
    stored = PerExpertFile.open(directory / WEIGHTS, config, arch.num_experts if arch else None)
    layers = {number: stored.layer(number) for number in stored.layers}
    layout = f"factors expert by expert ({stored.num_experts} experts)"
    return Imported(replace(file, sites=_sites(layers)), base, arch, layers, layout, rslora=False)


def _read_compact(directory: Path, options: ExportOptions) -> Imported:
    compact = read_compact(directory)
    file = AdapterFile(directory, PeftConfig({}), compact.base, (), compact.router_bias)
    base, arch = _base(file, options)
    layers = compact.layers()
    layout = "an adapter in compact form"
    return Imported(replace(file, sites=_sites(layers)), base, arch, layers, layout, rslora=compact.rslora)


def _base(file: AdapterFile, options: ExportOptions) -> tuple[GivenBase | None, Arch | None]:
    """The base that was given, and the sizes of it or of the one the adapter names; None where not known."""
    if options.base is None:
        return None, known_arch(file)
    location = find_base(file, options)
    checkpoint = Checkpoint.open(location.directory)
    return GivenBase(location, checkpoint), checkpoint.arch


def _sites(layers: dict[int, dict[str, LoraFactors]]) -> tuple[StoredSite, ...]:
    """Sites of factors in memory; they have no keys yet."""
    sites = []
    for number, layer in layers.items():
        for name, factors in layer.items():
            rank, inputs = factors.a.shape[-2:]
            experts = len(factors.a) if name in EXPERTS else 0
            sites.append(StoredSite(number, name, rank, factors.scale, experts, inputs, factors.b.shape[-2]))
    return tuple(sites)
