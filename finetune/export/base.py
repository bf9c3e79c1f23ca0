"""The base of an export: finding it, comparing it with the adapter, and presenting it as a native checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune import log
from finetune.adapters.config_file import CONFIG
from finetune.adapters.layout import module_path
from finetune.adapters.store import AdapterFile
from finetune.arch import Arch
from finetune.config.paths import shipped_dir
from finetune.config.schema import ModelConfig
from finetune.errors import InputError, MachineError
from finetune.export.companions import companions
from finetune.export.options import ExportOptions
from finetune.files import read_json
from finetune.model.build import Base
from finetune.model.checkpoint import CONFIG_FILE, Checkpoint, DenseCheckpoint
from finetune.model.hub import BaseLocation, locate_base
from finetune.model.identity import checkpoint_identity
from finetune.model.open import open_base
from finetune.model.write import write_native
from finetune.mxfp4.format import BLOCK

_PUBLISHED = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
_EXPERTS_PER_CHUNK = 4
_OTHER_BASE = "give the base the adapter was trained on with --base"


def find_base(adapter: AdapterFile, options: ExportOptions) -> BaseLocation:
    """The base's directory: the one asked for, or the one the adapter names.

    Raises:
        InputError: the adapter names none, or it is not available.
    """
    if options.base is not None:
        return locate_base(options.base, options.revision)
    name = adapter.base.name
    if not name:
        raise InputError(f"{adapter.directory} does not name its base", fix="give it with --base")
    return locate_base(name, None if Path(name).exists() else options.revision or adapter.base.revision)


def check_base(checkpoint: Checkpoint, adapter: AdapterFile) -> str:
    """Hash the base and compare it with the one the adapter was trained on.

    Returns:
        The base's identity.

    Raises:
        InputError: it is another base, or it was changed since.
    """
    with log.Progress("checking base", None, "MiB") as progress:
        identity = checkpoint_identity(checkpoint, progress)
    trained_on = adapter.base.identity
    if trained_on is None:
        log.warning(f"base {identity[:12]}: the adapter does not record which base it was trained on")
    elif trained_on != identity:
        raise InputError(
            f"{adapter.directory} was trained on another base",
            why=f"it belongs to {adapter.base.name} ({trained_on[:12]}), {checkpoint.directory} is "
            f"{identity[:12]}; a damaged or changed file has another identity too",
            fix="give the base it was trained on with --base",
        )
    return identity


def known_arch(adapter: AdapterFile) -> Arch | None:
    """Sizes of the base an adapter names, if its config.json is on this disk or is one of the published two."""
    path = _known_config(adapter)
    return None if path is None else Arch.from_config(read_json(path), str(path))


def is_known_dense(adapter: AdapterFile) -> bool:
    """Whether the base an adapter names is on this disk and has its experts in bfloat16."""
    path = _known_config(adapter)
    return path is not None and "quantization_config" not in read_json(path)


def _known_config(adapter: AdapterFile) -> Path | None:
    name = adapter.base.name
    directory = Path(name).expanduser() if name else None
    if name in _PUBLISHED:
        directory = shipped_dir("data") / "tokenizer" / name.rpartition("/")[2]
    return directory / CONFIG_FILE if directory is not None and (directory / CONFIG_FILE).is_file() else None


def check_fits(arch: Arch, adapter: AdapterFile) -> None:
    """Compare the shapes of every site with the base's weights.

    Raises:
        InputError: names the first site that does not fit.
    """
    _warn_of_missing_sites(arch, adapter)
    tensors = arch.expected_tensors()
    for name, change in adapter.router_bias.items():
        if name not in tensors or tensors[name][1] != tuple(change.shape):
            raise InputError(f"{adapter.directory} changes {name} {list(change.shape)}, which the base has not")
    for site in adapter.sites:
        name = site.module + ("_blocks" if site.num_experts else ".weight")
        if name not in tensors:
            raise InputError(
                f"{adapter.directory} adapts {site.module}, which the base has not ({arch.num_layers} layers)",
                fix=_OTHER_BASE,
            )
        sizes = tensors[name][1]
        experts, out, inputs = (*sizes[:2], sizes[2] * BLOCK) if site.num_experts else (0, *sizes)
        if (site.num_experts, site.out, site.inputs) != (experts, out, inputs):
            of = f"{experts} experts of " if experts else ""
            has = f"{site.num_experts} experts of " if site.num_experts else ""
            raise InputError(
                f"{adapter.directory}: {site.module} updates {has}{site.out} x {site.inputs}, the base has "
                f"{of}{out} x {inputs}",
                fix=_OTHER_BASE,
            )


def _warn_of_missing_sites(arch: Arch, adapter: AdapterFile) -> None:
    """Name weights that the settings adapt in every layer, and whose factors are missing in some."""
    names = {site.name for site in adapter.sites}
    missing = [
        module_path(layer, name)
        for layer in range(arch.num_layers)
        for name in sorted(names - {site.name for site in adapter.sites if site.layer == layer})
        if adapter.config.surely_targets(module_path(layer, name), layer)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        log.warning(
            f"{adapter.directory} lacks the factors of {missing[0]}{more}, which its {CONFIG} adapts: left as in the "
            "base. If the file is cut short, save the adapter again"
        )


def open_reference(checkpoint: Checkpoint) -> Base:
    """Open a checkpoint with the reference kernels, on the GPU if there is one."""
    return open_base(reference_settings(checkpoint), checkpoint=checkpoint, verify_files=False, quiet=True)


def reference_settings(checkpoint: Checkpoint) -> ModelConfig:
    """A `model` configuration with the reference kernels."""
    return ModelConfig(
        path=str(checkpoint.directory),
        expert_kernel="reference",
        attention_kernel="reference",
        experts_per_chunk=_EXPERTS_PER_CHUNK,
    )


@contextmanager
def native_base(checkpoint: Checkpoint, out: Path) -> Iterator[Checkpoint]:
    """A native checkpoint as it is; a bfloat16 one as a rounded copy beside the export, removed after the block.

    The adapter was trained over the rounded experts, so they are what it is merged into: the original ones plus the
    update would be another model.

    Args:
        checkpoint: the base.
        out: the export's directory; the copy is made beside it.

    Raises:
        MachineError: the disk has no room for the copy.
    """
    if not isinstance(checkpoint, DenseCheckpoint):
        yield checkpoint
        return
    copy = out.with_name(f".{out.name}.base")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    try:
        free = shutil.disk_usage(copy).free
        if free < checkpoint.num_bytes:
            raise MachineError(
                f"a rounded copy of the base needs {checkpoint.num_bytes:,} bytes and the disk has {free:,} free",
                fix="free some space, or give --out on a larger disk",
            )
        write_native(checkpoint, copy)
        for path in companions(checkpoint):
            if path.name != CONFIG_FILE:
                shutil.copyfile(path, copy / path.name)
        log.info(checkpoint.describe_rounding())
        yield Checkpoint.open(copy)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
