"""Export an adapter as a serving stack reads it: no base weights, no tokenizer, and the command that serves it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from finetune import __version__, log
from finetune.adapters.store import (
    CONFIG,
    PROVENANCE,
    WEIGHTS,
    AdapterFile,
    staged_adapter,
    warn_held_as,
    write_facts,
    write_peft_directory,
)
from finetune.arch import Arch
from finetune.config.paths import shipped_dir
from finetune.export.card import write_card
from finetune.export.factors import largest_rank, layers_of, refuse_swapped
from finetune.export.gguf_lora import FILE, gguf_lora_lines, gguf_lora_tensors, write_gguf_lora
from finetune.export.mlx import MLX_WEIGHTS, mlx_config, mlx_lines, mlx_tensors
from finetune.export.options import CARD, FACTS, AdapterTarget, ExportOptions
from finetune.export.peft import adapts_every_layer, peft_contents, served_rank, vllm_line
from finetune.export.plan import check_fits
from finetune.export.sglang import sglang_config, sglang_lines, sglang_tensors
from finetune.export.verify import verify_adapter
from finetune.files import read_json, sha256_of
from finetune.model.checkpoint import CONFIG_FILE, Checkpoint
from finetune.staging import refuse_existing

_PUBLISHED = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")


@dataclass(frozen=True)
class Contents:
    """What an exported directory will hold.

    Attributes:
        file: name of the file with the tensors.
        tensors: by the target's names.
        config: fields of adapter_config.json (for `peft` those of PEFT's LoraConfig); for `gguf-lora` its alpha.
        lines: how to serve it.
    """

    file: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    lines: list[str]


def export_adapter(
    source: AdapterFile, target: AdapterTarget, out: Path, options: ExportOptions, run: Path | None = None
) -> None:
    """Write an adapter for a serving stack, or print what would be written.

    Args:
        source: the adapter.
        target: `peft`, `sglang`, `gguf-lora` or `mlx`.
        out: must not exist.
        options: what the command line asked for. With a base, its identity and shapes are compared.
        run: the run directory, for the model card; None: a card without recipe, data and evaluation.

    Raises:
        ConfigError: `out` exists.
        InputError: the adapter is not the base's, or the target cannot carry it.
        MachineError: it cannot be written, or a package is missing.
        CheckError: what was written does not do what the adapter does; nothing is kept.
    """
    refuse_existing(out)
    shape = _check_base(source, options)
    contents = _contents(source, target, out, shape, options)
    if source.router_bias:
        left_out = f"changes of {len(source.router_bias)} routers' biases"
        log.warning(f"left out: {left_out}; only merged exports carry them (--to bf16)")
    if options.dry_run:
        for line in _describe(contents, target):
            log.result(line)
        return
    facts = source.base_facts
    warn_held_as(facts, {}, source.directory)

    def finish(staging: Path) -> None:
        _finish(
            staging, source, target, [line.replace(str(out.resolve()), ".") for line in contents.lines], options, run
        )

    if target == "peft":
        write_peft_directory(out, contents.tensors, contents.config, facts, finish)
    else:
        _write(out, target, contents, facts | {"exported_from": sha256_of(source.directory / WEIGHTS)}, finish)
    for line in contents.lines:
        log.info(line)


def known_shape(source: AdapterFile) -> Arch | None:
    """The sizes of the base an adapter names, if its config.json is on this disk or is one of the published two."""
    name = source.base_name
    directory = Path(name).expanduser() if name else None
    if name in _PUBLISHED:
        directory = shipped_dir("data") / "tokenizer" / name.rpartition("/")[2]
    if directory is None or not (directory / CONFIG_FILE).is_file():
        return None
    return Arch.from_config(read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE))


def _check_base(source: AdapterFile, options: ExportOptions) -> Arch | None:
    """Compare the adapter with its base as far as that is here: wholly if one was given, else by shapes.

    Returns:
        The base's sizes; None if they are not known here.
    """
    if options.base is None:
        shape = known_shape(source)
        refuse_swapped(source, shape)
        if shape is None:
            log.warning(f"no base here to compare {source.directory} with; --base BASE does")
        else:
            check_fits(shape, source)
        return shape
    from finetune.export.merged import check_base, find_base

    checkpoint = Checkpoint.open(find_base(source, options).directory)
    refuse_swapped(source, checkpoint.arch)
    check_fits(checkpoint.arch, source)
    check_base(checkpoint, source)
    return checkpoint.arch


def _contents(
    source: AdapterFile, target: AdapterTarget, out: Path, shape: Arch | None, options: ExportOptions
) -> Contents:
    match target:
        case "peft":
            rank = served_rank(largest_rank(source)) if options.pad_rank else None
            tensors, fields = peft_contents(
                ((number, source.layer(number)) for number in layers_of(source)),
                rslora=bool(source.config.get("use_rslora")),
                every_layer=adapts_every_layer(source, shape),
                rank=rank,
            )
            return Contents(WEIGHTS, tensors, fields, [vllm_line(source, out)])
        case "sglang":
            return Contents(WEIGHTS, sglang_tensors(source, shape), sglang_config(source), sglang_lines(source, out))
        case "mlx":
            return Contents(MLX_WEIGHTS, mlx_tensors(source), mlx_config(source), mlx_lines(source, out))
        case "gguf-lora":
            tensors, alpha = gguf_lora_tensors(source)
            return Contents(FILE, tensors, {"adapter.lora.alpha": alpha}, gguf_lora_lines(out))


def _write(
    out: Path, target: AdapterTarget, contents: Contents, facts: dict[str, Any], finish: Callable[[Path], None]
) -> None:
    with staged_adapter(out) as staging:
        if target == "gguf-lora":
            write_gguf_lora(staging / contents.file, contents.tensors, contents.config["adapter.lora.alpha"])
        else:
            save_file(contents.tensors, staging / contents.file, metadata={"format": "pt"})
            write_facts(staging / CONFIG, contents.config)
        files = {path.name: sha256_of(path) for path in sorted(staging.iterdir())}
        written_by = f"gpt-oss-finetune {__version__}"
        write_facts(staging / PROVENANCE, {"written_by": written_by, "target": target, **facts, "files": files})
        finish(staging)


def _finish(
    staging: Path,
    source: AdapterFile,
    target: AdapterTarget,
    lines: list[str],
    options: ExportOptions,
    run: Path | None,
) -> None:
    """Verify what was written, and say beside it what was found: export.json and the model card."""
    facts: dict[str, Any] = {
        "written_by": f"gpt-oss-finetune {__version__}",
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "target": target,
        "base": {"name": source.base_name, "revision": source.base_revision, "identity": source.base_identity},
        "adapter": {
            "directory": str(source.directory.resolve()),
            "sha256": sha256_of(source.directory / WEIGHTS),
            "sites": len(source.sites),
        },
    }
    if options.verify:
        facts["verification"] = verify_adapter(source, target, staging)
    else:
        log.warning("the result was not verified (--no-verify)")
        facts["verification"] = {"skipped": "--no-verify"}
    write_card(staging / CARD, facts, run, lines)
    files = {path.name: sha256_of(path) for path in sorted(staging.iterdir())}
    write_facts(staging / FACTS, facts | {"files": files})


def _describe(contents: Contents, target: AdapterTarget) -> list[str]:
    """One line a tensor, the settings, and the total."""
    lines = [
        f"  {tensor.numel() * tensor.element_size():>13,}  {name} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in contents.tensors.items()
    ]
    total = sum(tensor.numel() * tensor.element_size() for tensor in contents.tensors.values())
    settings = [f"  {key}: {value}" for key, value in contents.config.items()]
    return [contents.file, *lines, "settings" if target == "gguf-lora" else CONFIG, *settings,
            f"{len(contents.tensors)} tensors, {total:,} bytes"]  # fmt: skip
