"""Export an adapter as a serving stack reads it: no base weights, no tokenizer, and the command that serves it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from finetune import log
from finetune.adapters.config_file import CONFIG
from finetune.adapters.provenance import warn_other_storage, write_provenance
from finetune.adapters.store import WEIGHTS, AdapterFile, write_directory
from finetune.arch import Arch
from finetune.export.base import check_base, check_fits, find_base, is_known_dense, known_arch
from finetune.export.card import write_card
from finetune.export.factors import refuse_swapped
from finetune.export.options import CARD, RECORD, AdapterTarget, ExportOptions
from finetune.export.record import ExportRecord, Skipped, as_json
from finetune.export.targets.gguf_lora import FILE, gguf_lora_commands, gguf_lora_tensors, write_gguf_lora
from finetune.export.targets.mlx import MLX_WEIGHTS, mlx_commands, mlx_config, mlx_tensors
from finetune.export.targets.peft import adapts_every_layer, peft_contents, served_rank, vllm_commands
from finetune.export.targets.sglang import sglang_commands, sglang_config, sglang_tensors
from finetune.export.verify import verify_adapter
from finetune.files import refuse_existing, sha256_of, staged_directory, write_json
from finetune.model.checkpoint import Checkpoint, DenseCheckpoint


@dataclass(frozen=True)
class Contents:
    """Contents of an exported directory.

    Attributes:
        file: name of the file with the tensors.
        tensors: by the target's names.
        config: fields of adapter_config.json (for `peft` those of PEFT's LoraConfig); for `gguf-lora` its alpha.
        commands: the command that serves it, and notes on it.
    """

    file: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    commands: list[str]


def export_adapter(
    adapter: AdapterFile, target: AdapterTarget, out: Path, options: ExportOptions, run: Path | None = None
) -> None:
    """Write an adapter for a serving stack, or print what would be written.

    Args:
        adapter: opened.
        target: `peft`, `sglang`, `gguf-lora` or `mlx`.
        out: must not exist.
        options: of the command line. With a base, its identity and shapes are compared.
        run: the run directory, for the model card; None: a card without recipe, data and evaluation.

    Raises:
        ConfigError: `out` exists.
        InputError: the adapter is not the base's, or the target cannot represent it.
        MachineError: it cannot be written, or a package is missing.
        CheckError: what was written is another update than the adapter's; nothing is kept.
    """
    refuse_existing(out)
    arch, base_is_packed = _check_base(adapter, options)
    contents = _contents(adapter, target, out, arch, options, base_is_packed)
    dropped = _dropped(adapter)
    for left_out in dropped.get("left_out", ()):
        log.warning(f"left out: {left_out}; only merged exports include them (--to bf16)")
    if options.dry_run:
        for line in _describe(contents, target):
            log.result(line)
        return
    warn_other_storage(adapter.base, {}, adapter.directory)

    def finish(staging: Path) -> None:
        commands = [line.replace(str(out.resolve()), ".") for line in contents.commands]
        _finish(staging, adapter, target, commands, options, run)

    if target == "peft":
        write_directory(out, contents.tensors, contents.config, adapter.base, dropped, finish=finish)
    else:
        with staged_directory(out, "the adapter", file_mode=0o644) as staging:
            _write(staging, adapter, target, contents, dropped)
            finish(staging)
    for line in contents.commands:
        log.info(line)


def _check_base(adapter: AdapterFile, options: ExportOptions) -> tuple[Arch | None, bool]:
    """Compare the adapter with its base: shapes and identity if one was given, else shapes if they are known.

    Returns:
        The base's sizes, None if they are not known here; and whether its experts are in MXFP4, as far as is known.
    """
    if options.base is None:
        arch = known_arch(adapter)
        refuse_swapped(adapter, arch)
        if arch is None:
            log.warning(f"no base here to compare {adapter.directory} with; --base BASE does")
        else:
            check_fits(arch, adapter)
        return arch, not is_known_dense(adapter)
    checkpoint = Checkpoint.open(find_base(adapter, options).directory)
    refuse_swapped(adapter, checkpoint.arch)
    check_fits(checkpoint.arch, adapter)
    check_base(checkpoint, adapter)
    return checkpoint.arch, not isinstance(checkpoint, DenseCheckpoint)


def _contents(
    adapter: AdapterFile,
    target: AdapterTarget,
    out: Path,
    arch: Arch | None,
    options: ExportOptions,
    base_is_packed: bool,
) -> Contents:
    match target:
        case "peft":
            tensors, fields = peft_contents(
                ((number, adapter.layer(number)) for number in adapter.layers),
                rslora=adapter.config.use_rslora,
                every_layer=adapts_every_layer(adapter, arch),
                rank=served_rank(adapter.max_rank) if options.pad_rank else None,
            )
            return Contents(WEIGHTS, tensors, fields, vllm_commands(adapter, out))
        case "sglang":
            commands = sglang_commands(adapter, out)
            return Contents(WEIGHTS, sglang_tensors(adapter, arch), sglang_config(adapter), commands)
        case "mlx":
            commands = mlx_commands(adapter, out, options.base, base_is_packed=base_is_packed)
            return Contents(MLX_WEIGHTS, mlx_tensors(adapter), mlx_config(adapter), commands)
        case "gguf-lora":
            tensors, alpha = gguf_lora_tensors(adapter)
            return Contents(FILE, tensors, {"adapter.lora.alpha": alpha}, gguf_lora_commands(out))


def _dropped(adapter: AdapterFile) -> dict[str, Any]:
    """What an export does not take over from its adapter, for finetune.json; empty if it takes all."""
    biases = [f"changes of {len(adapter.router_bias)} routers' biases"] if adapter.router_bias else []
    found = {"left_out": biases, "ignored_settings": adapter.config.ignored()}
    return {key: value for key, value in found.items() if value}


def _write(
    staging: Path, adapter: AdapterFile, target: AdapterTarget, contents: Contents, dropped: dict[str, Any]
) -> None:
    path = staging / contents.file
    if target == "gguf-lora":
        write_gguf_lora(path, contents.tensors, contents.config["adapter.lora.alpha"])
    else:
        save_file(contents.tensors, path, metadata={"format": "pt"})
        write_json(staging / CONFIG, contents.config)
    source = {"exported_from": sha256_of(adapter.directory / WEIGHTS)}
    write_provenance(staging, {"target": target} | adapter.base.as_provenance() | source | dropped)


def _finish(
    staging: Path,
    adapter: AdapterFile,
    target: AdapterTarget,
    commands: list[str],
    options: ExportOptions,
    run: Path | None,
) -> None:
    """Verify what was written, and record the outcome beside it: export.json and the model card."""
    record = ExportRecord.of(target, adapter.base, adapter)
    if options.verify:
        record.verification = verify_adapter(adapter, target, staging)
    else:
        log.warning("the result was not verified (--no-verify)")
        record.verification = Skipped("--no-verify")
    write_card(staging / CARD, record, run, commands)
    files = {path.name: sha256_of(path) for path in sorted(staging.iterdir())}
    write_json(staging / RECORD, as_json(record) | {"files": files})


def _describe(contents: Contents, target: AdapterTarget) -> list[str]:
    """One line per tensor, the settings, and the total."""
    lines = [
        f"  {tensor.numel() * tensor.element_size():>13,}  {name} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in contents.tensors.items()
    ]
    total = sum(tensor.numel() * tensor.element_size() for tensor in contents.tensors.values())
    settings = [f"  {key}: {value}" for key, value in contents.config.items()]
    return [contents.file, *lines, "settings" if target == "gguf-lora" else CONFIG, *settings,
            f"{len(contents.tensors)} tensors, {total:,} bytes"]  # fmt: skip
