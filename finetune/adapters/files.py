"""Writing and reading adapter directories, so that what is on disk is whole, belongs to this base, and is finite."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import __version__, log
from finetune.adapters.config_file import CONFIG, read_adapter_config
from finetune.adapters.lora import Adapter
from finetune.adapters.peft_layout import from_peft, peft_config_fields, peft_keys, to_peft
from finetune.adapters.peft_package import LoraConfig
from finetune.adapters.stored import (
    fill,
    read_router_bias,
    router_bias_changes,
    stored_factors,
    write_router_bias,
)
from finetune.config.schema import AdapterConfig
from finetune.digest import sha256_of
from finetune.errors import CheckError, InputError, MachineError
from finetune.model.headers import plain_file_name

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
    with staged_directory(directory) as staging:
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


@contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """Give a directory to write into that gets its final name at the end of the block, and is removed if that fails.

    Raises:
        InputError: the directory exists.
        MachineError: it cannot be written, the disk is full.
    """
    if directory.exists():
        raise InputError(f"{directory} exists already", fix="choose another directory or remove it")
    staging = directory.with_name(directory.name + ".partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for path in staging.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner only
            with path.open("rb") as file:
                os.fsync(file.fileno())  # what the rename makes visible must be on the disk
        os.rename(staging, directory)
    except (OSError, SafetensorError) as error:  # a full disk reaches us as either
        raise MachineError(
            f"cannot write the adapter to {directory}: {error}", fix="free disk space or choose another place"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
