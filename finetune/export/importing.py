"""Import adapters of other tools: PEFT of any version, factors for each expert, or our compact form."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from finetune import log
from finetune.adapters.compact import COMPACT_WEIGHTS, is_compact, read_compact
from finetune.adapters.config_file import CONFIG, GROUPED_BY_EXPERT, PeftConfig, refuse_other_form
from finetune.adapters.layout import EXPERTS, StoredSite, parse_sites
from finetune.adapters.provenance import PROVENANCE, ROUTER_BIAS, BaseRecord, read_router_bias
from finetune.adapters.store import WEIGHTS, AdapterFile, read_description, write_directory
from finetune.arch import Arch
from finetune.errors import InputError
from finetune.export.base import check_base, check_fits, find_base, known_arch
from finetune.export.factors import SWAPPING_RELEASE, is_swapped, regrouped, swapped_back
from finetune.export.foreign_keys import translate
from finetune.export.options import ExportOptions
from finetune.export.targets.peft import adapts_every_layer, peft_contents
from finetune.export.targets.sglang import PerExpertFile, has_per_expert_keys
from finetune.files import refuse_existing, sha256_of
from finetune.kernels.experts import LoraFactors
from finetune.model.checkpoint import Checkpoint
from finetune.model.headers import join, read_header
from finetune.model.hub import BaseLocation

_READ_FILES = frozenset({CONFIG, PROVENANCE, ROUTER_BIAS})
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
    left_out = sorted(path.name for path in directory.iterdir() if path.name not in _READ_FILES | {source.name})
    ignored = adapter.file.config.ignored()
    record = {
        "imported_from": sha256_of(source),
        "imported_layout": adapter.layout,
        "left_out_files": left_out,
        "ignored_settings": ignored,
    }
    write_directory(out, tensors, fields, base, record, router_bias=adapter.file.router_bias)
    log.info(f"read {adapter.layout}: {len(adapter.file.sites)} sites in {len(adapter.layers)} layers")
    if left_out:
        tokens = any(_TOKENIZER_FILES.fullmatch(name) for name in left_out)
        log.warning(f"left out: {join(left_out)}" + ("; an adapter's tokens are its base's" if tokens else ""))
    if ignored:
        log.info(f"without effect on what the tensors mean: {', '.join(f'{k}={v}' for k, v in ignored.items())}")


def _read(directory: Path, options: ExportOptions) -> Imported:
    if not directory.is_dir():
        raise InputError(f"no adapter directory {directory}")
    if is_compact(directory):
        return _read_compact(directory, options)
    refuse_other_form(directory)
    if not (directory / WEIGHTS).is_file():
        raise InputError(f"{directory} lacks {WEIGHTS}", fix="give an adapter's own directory")
    config, recorded = read_description(directory)
    base, arch = _base(AdapterFile(directory, config, recorded, sites=()), options)
    with tempfile.TemporaryDirectory(prefix="finetune-import-") as scratch:
        found = translate(directory, config, Path(scratch), arch.num_experts if arch else None)
        is_per_expert = has_per_expert_keys(read_header(found.directory / WEIGHTS))
        read = _read_per_expert if is_per_expert else _read_peft
        try:
            imported = read(found.directory, config, recorded, arch)
        except InputError as error:  # the user's file is named, not the copy
            what = error.what.replace(str(found.directory), str(directory))
            raise InputError(what, why=error.why, fix=error.fix) from error
    changes = "".join(f"; {change}" for change in found.changes)
    return replace(imported, base=base, layout=imported.layout + changes)


def _read_peft(directory: Path, config: PeftConfig, recorded: BaseRecord, arch: Arch | None) -> Imported:
    shapes = {name: entry.shape for name, entry in read_header(directory / WEIGHTS).items()}
    sites = parse_sites(shapes, config, directory / WEIGHTS)
    file = AdapterFile(directory, config, recorded, sites, read_router_bias(directory))
    layers = {number: file.layer(number) for number in file.layers}
    layout = f"PEFT {file.config.peft_version or 'of an unknown version'}"
    if config.is_grouped_by_expert:
        layers = _changed_experts(layers, regrouped)
        layout += ", lora_B of experts stored expert after expert, put into PEFT's order"
    elif config.expert_order is None and _is_by_unsloth(directory, config) and _has_orders(sites):
        log.warning(
            "Unsloth has written lora_B of experts in two orders, and this file has no lora_B_layout to tell them "
            "apart: it is read in PEFT's order. Compare its answers with those of the model that was trained; if they "
            f'differ, import it with "lora_B_layout": "{GROUPED_BY_EXPERT}" in {CONFIG}, the order of older releases'
        )
    if is_swapped(file, arch):
        layers = _changed_experts(layers, swapped_back)
        sites = tuple(replace(s, inputs=s.out, out=s.inputs) if s.name in EXPERTS else s for s in file.sites)
        file = replace(file, sites=sites)
        layout += f", expert factors swapped as {SWAPPING_RELEASE} did, turned the right way round"
    return Imported(file, None, arch, layers, layout, file.config.use_rslora)


def _changed_experts(
    layers: dict[int, dict[str, LoraFactors]], change: Callable[[LoraFactors], LoraFactors]
) -> dict[int, dict[str, LoraFactors]]:
    return {
        number: {name: change(factors) if name in EXPERTS else factors for name, factors in layer.items()}
        for number, layer in layers.items()
    }


def _has_orders(sites: tuple[StoredSite, ...]) -> bool:
    """Whether the two orders of experts' lora_B differ: with one expert, or rank 1, they are the same."""
    return any(site.num_experts > 1 < site.rank for site in sites)


def _is_by_unsloth(directory: Path, config: PeftConfig) -> bool:
    """Whether anything beside the tensors says that Unsloth wrote them."""
    card = directory / "README.md"
    texts = [str(config.settings), card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""]
    return any("unsloth" in text.lower() for text in texts)


def _read_per_expert(directory: Path, config: PeftConfig, recorded: BaseRecord, arch: Arch | None) -> Imported:
    file = AdapterFile(directory, config, recorded, sites=())
    stored = PerExpertFile.open(directory / WEIGHTS, config, arch.num_experts if arch else None)
    layers = {number: stored.layer(number) for number in stored.layers}
    layout = f"factors expert by expert ({stored.num_experts} experts)"
    return Imported(replace(file, sites=_sites(layers)), None, arch, layers, layout, rslora=False)


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
