"""Read adapters that others wrote, PEFT of any version or factors expert by expert, and write them in our layout."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from finetune import log
from finetune.adapters.compact import COMPACT_WEIGHTS, expanded, is_compact, read_compact
from finetune.adapters.config_file import read_adapter_config
from finetune.adapters.store import (
    CONFIG,
    EXPERTS,
    WEIGHTS,
    AdapterFile,
    Factors,
    StoredSite,
    open_adapter,
    read_provenance,
    refuse_unsupported,
    write_peft_directory,
)
from finetune.arch import Arch
from finetune.errors import InputError
from finetune.export.adapters import known_shape
from finetune.export.factors import SWAPPING_RELEASE, is_swapped, layers_of, turned
from finetune.export.options import ExportOptions
from finetune.export.peft import adapts_every_layer, peft_contents
from finetune.export.plan import check_fits
from finetune.export.sglang import PerExpertFile, holds_per_expert_keys
from finetune.files import sha256_of
from finetune.model.checkpoint import Checkpoint
from finetune.model.headers import join, read_header
from finetune.model.hub import BaseLocation
from finetune.staging import refuse_existing

_NOT_SAFETENSORS = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_TOKENIZER_FILES = re.compile(r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template)\..*")


class Base(NamedTuple):
    """A base that was given: where it lies, opened."""

    location: BaseLocation
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Imported:
    """An adapter in memory, the right way round.

    Attributes:
        source: what it was read from; its sites are those of `layers`.
        base: the base that was given with it.
        shape: of its base, if known.
        layers: layer number -> site name -> factors.
        layout: how the file was laid out, for the person.
        rslora: scales are to be written as alpha / sqrt(rank).
    """

    source: AdapterFile
    base: Base | None
    shape: Arch | None
    layers: dict[int, dict[str, Factors]]
    layout: str
    rslora: bool


def import_adapter(directory: Path, out: Path, options: ExportOptions) -> None:
    """Write someone's adapter in our PEFT layout.

    Args:
        directory: what they wrote.
        out: must not exist.
        options: `base` and `revision`: the base it belongs to, to check it and to record its identity.

    Raises:
        ConfigError: `out` exists.
        InputError: it cannot be read, its layout is not known, or it does not fit the base.
    """
    refuse_existing(out)
    adapter = _read(directory, options)
    facts = adapter.source.base_facts
    if adapter.shape is not None:
        check_fits(adapter.shape, adapter.source)
    if adapter.base is not None:
        from finetune.export.merged import check_base

        facts |= {"base_name": adapter.base.location.name, "base_revision": adapter.base.location.revision}
        facts["base_identity"] = check_base(adapter.base.checkpoint, adapter.source)
    elif facts["base_identity"] is None:
        log.warning("which base it belongs to is not recorded; --base BASE checks it and records it")
    tensors, fields = peft_contents(
        sorted(adapter.layers.items()),
        rslora=adapter.rslora,
        every_layer=adapts_every_layer(adapter.source, adapter.shape),
    )
    file = directory / (COMPACT_WEIGHTS if is_compact(directory) else WEIGHTS)
    bias = adapter.source.router_bias
    write_peft_directory(out, tensors, fields, facts | {"imported_from": sha256_of(file)}, router_bias=bias)
    log.info(f"read {adapter.layout}: {len(adapter.source.sites)} sites in {len(adapter.layers)} layers")
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
    if holds_per_expert_keys(read_header(directory / WEIGHTS)):
        return _read_per_expert(directory, options)
    source = open_adapter(directory)
    base, shape = _base(source, options)
    layers = {number: source.layer(number) for number in layers_of(source)}
    layout = f"PEFT {source.config.get('peft_version') or 'of an unknown version'}"
    if is_swapped(source, shape):
        layers = {
            number: {name: turned(factors) if name in EXPERTS else factors for name, factors in layer.items()}
            for number, layer in layers.items()
        }
        sites = tuple(replace(s, inputs=s.out, out=s.inputs) if s.name in EXPERTS else s for s in source.sites)
        source = replace(source, sites=sites)
        layout += f", expert factors swapped as {SWAPPING_RELEASE} did, turned the right way round"
    return Imported(source, base, shape, layers, layout, bool(source.config.get("use_rslora")))


def _read_per_expert(directory: Path, options: ExportOptions) -> Imported:
    provenance = read_provenance(directory) or {}
    config = read_adapter_config(directory / CONFIG)
    refuse_unsupported(config, directory)
    source = AdapterFile(
        directory,
        config,
        provenance.get("base_name") or config.get("base_model_name_or_path"),
        provenance.get("base_revision") or config.get("revision"),
        provenance.get("base_identity"),
        sites=(),
        base_held_as=provenance.get("base_held_as") or {},
    )
    base, shape = _base(source, options)
    file = PerExpertFile.open(directory / WEIGHTS, config, shape.num_experts if shape else None)
    layers = {number: file.layer(number) for number in file.layers}
    sites = tuple(_site(number, name, factors) for number, layer in layers.items() for name, factors in layer.items())
    layout = f"factors expert by expert ({file.num_experts} experts)"
    return Imported(replace(source, sites=sites), base, shape, layers, layout, rslora=False)


def _read_compact(directory: Path, options: ExportOptions) -> Imported:
    compact = read_compact(directory)
    name, revision, identity = (compact.facts.get(f"base_{key}") for key in ("name", "revision", "identity"))
    held_as = compact.facts.get("base_held_as") or {}
    source = AdapterFile(directory, {}, name, revision, identity, (), held_as, compact.router_bias)
    base, shape = _base(source, options)
    layers = expanded(compact)
    sites = tuple(_site(number, name, factors) for number, layer in layers.items() for name, factors in layer.items())
    layout = "an adapter in compact form"
    return Imported(replace(source, sites=sites), base, shape, layers, layout, rslora=compact.rslora)


def _base(source: AdapterFile, options: ExportOptions) -> tuple[Base | None, Arch | None]:
    """The base that was given, and the sizes of it or of the one the adapter names; None where not known."""
    if options.base is None:
        return None, known_shape(source)
    from finetune.export.merged import find_base

    location = find_base(source, options)
    checkpoint = Checkpoint.open(location.directory)
    return Base(location, checkpoint), checkpoint.arch


def _site(number: int, name: str, factors: Factors) -> StoredSite:
    """What a site would be in a file of ours; it has no keys yet."""
    rank, inputs = factors.a.shape[-2:]
    experts = len(factors.a) if name in EXPERTS else 0
    return StoredSite(number, name, rank, factors.scale, experts, inputs, factors.b.shape[-2], "", "")
