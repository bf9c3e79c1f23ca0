"""Values that follow from a configuration: derived numbers, DeepSpeed's settings, and inputs that must exist."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

from finetune.config.expert_selection import highest_rank, parse_rank_by, parse_select, require_file
from finetune.config.fields import Plain
from finetune.config.paths import (
    HUB_PREFIX,
    fix_for_missing_data,
    is_glob,
    matching_files,
    refuse_special_file,
    resolve_data_path,
)
from finetune.config.rules import DEEPSPEED
from finetune.config.schema import ExpertAdapterConfig, RunConfig, SourceConfig
from finetune.config.suggest import looks_like_directory, suggest_base, suggest_path
from finetune.errors import InputError, MachineError

NEVER = 10**9


def deepspeed_settings(config: RunConfig) -> Plain | None:
    """Build DeepSpeed's settings, shown by `config show` and a dry run and stored in the run directory.

    DeepSpeed sees only the adapter: the base's tensors are no parameters to it. The optimiser is torch's AdamW, as
    with every other kind, and clipping and accumulation are the recipe's.

    Returns:
        None if the recipe does not use DeepSpeed.
    """
    if config.distributed.kind not in DEEPSPEED:
        return None
    trainer = config.trainer
    stage = int(config.distributed.kind.removeprefix("zero"))
    zero: Plain = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # shard small tensors too: the adapter consists of them
    return {
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
    }


def deepspeed_lines(config: RunConfig) -> list[str]:
    """Format DeepSpeed's settings for printing; nothing if the recipe does not use DeepSpeed."""
    settings = deepspeed_settings(config)
    return ["DeepSpeed settings:", *json.dumps(settings, indent=2).splitlines()] if settings else []


def lora_scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """Give the factor of an update b @ a: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def derived_lines(config: RunConfig) -> list[str]:
    """Write the numbers that follow from others, with the arithmetic that gives them."""
    data, trainer, adapter = config.data, config.trainer, config.adapter
    count = config.distributed.num_processes
    sequences = trainer.micro_batch_size * trainer.gradient_accumulation_steps * count
    lines = [
        f"sequences per step = {trainer.micro_batch_size} (micro_batch_size) x {trainer.gradient_accumulation_steps} "
        f"(gradient_accumulation_steps) x {count} rank{'s' if count > 1 else ''} = {sequences:,}",
        f"tokens per step = {sequences:,} sequences x {data.max_length:,} = at most {sequences * data.max_length:,}",
    ]
    for name, lora in (("attention", adapter.attention), ("experts", adapter.experts)):
        if isinstance(lora, ExpertAdapterConfig) and lora.rank_by != "uniform" and lora.rank:
            lines.append(_by_use(lora, rslora=adapter.rslora))
        elif lora.rank > 0:
            divisor = f"sqrt(rank {lora.rank})" if adapter.rslora else f"rank {lora.rank}"
            scale = lora_scale(lora.alpha, lora.rank, rslora=adapter.rslora)
            lines.append(f"LoRA scale on {name} = alpha {lora.alpha:g} / {divisor} = {scale:g}")
        else:
            lines.append(f"{name}: not adapted (rank 0)")
    lines += router_notes(config)
    lines.append(learning_rate_line(config))
    return lines


def learning_rate_line(config: RunConfig) -> str:
    """Describe the schedule, and whether its peak is the objective's default."""
    trainer = config.trainer
    peak = trainer.peak_learning_rate
    last = peak * (1.0 if trainer.schedule == "constant" else trainer.min_lr_ratio)
    default = f" (default of {config.objective.kind})" if peak == config.objective.default_learning_rate else ""
    return (
        f"learning rate: warm-up over {trainer.warmup_ratio:.0%} of the steps to {peak:g}{default}, "
        f"then {trainer.schedule} to {last:g}"
    )


def _by_use(experts: ExpertAdapterConfig, *, rslora: bool) -> str:
    highest = highest_rank(experts)
    least, most = (lora_scale(experts.alpha, rank, rslora=rslora) for rank in (highest, 1))
    divisor = "sqrt(its own rank)" if rslora else "its own rank"
    return (
        f"expert ranks by {experts.rank_by}: {experts.rank} x adapted experts per layer in total, 0 to {highest} each; "
        f"LoRA scale on an expert = alpha {experts.alpha:g} / {divisor} = {most:g} down to {least:g}"
    )


def router_notes(config: RunConfig) -> list[str]:
    """Describe where a trained router can be served, and which part of it no adapter file contains."""
    router = config.adapter.router
    if router.mode == "frozen":
        return []
    served = "PEFT, vLLM, llama.cpp and mlx-lm read an adapter's router; SGLang does not: for it merge (--to bf16)"
    if router.mode == "lora":
        scale = lora_scale(router.alpha, router.rank, rslora=config.adapter.rslora)
        return [f"LoRA scale on routers = {scale:g} (rank {router.rank}). {served}"]
    return [
        "routers: whole weight and bias are trained. The change of the weight is exported as LoRA whose rank is the "
        f"number of experts, so vLLM needs --max-lora-rank of at least that. {served}",
        "routers: the change of the bias fits into no adapter file; only merged exports (bf16, mxfp4, gguf) contain it",
    ]


def check_inputs(config: RunConfig) -> list[str]:
    """Check that the base and every source can be found, without reading them.

    Returns:
        A line for each.

    Raises:
        InputError: a file or directory is missing.
        MachineError: a package that the recipe asks for is not installed.
    """
    _check_packages(config)
    lines = [f"base: {_describe_base(config.model.path)}"]
    for split in ("train", "validation", "test"):
        for name, source in getattr(config.data, split).items():
            only = ", ".join(f"{key} is {value}" for key, value in source.where.items())
            found = _describe_source(f"data.{split}.{name}.path", source.path)
            lines.append(f"data.{split}.{name}: {found}" + (f", {only}" if only else ""))
    if config.adapter.init_from is not None and not Path(config.adapter.init_from).expanduser().is_dir():
        raise InputError(f"adapter.init_from: there is no directory {config.adapter.init_from}")
    rule = parse_select(config.adapter.experts.select)
    if rule.kind == "file":
        require_file(Path(rule.path).expanduser())
    rank_rule = parse_rank_by(config.adapter.experts.rank_by)
    if rank_rule.kind == "file":
        require_file(Path(rank_rule.path).expanduser(), "rank_by")
    return lines


def _check_packages(config: RunConfig) -> None:
    """Refuse optional packages that are missing, before anything is read."""
    wanted = [
        (config.distributed.kind in DEEPSPEED, "deepspeed", f"distributed.kind={config.distributed.kind}",
         "pip install 'gpt-oss-finetune[deepspeed]', or use distributed=fsdp2, which needs nothing more"),
        (config.trainer.optimizer != "adamw", "bitsandbytes", f"trainer.optimizer={config.trainer.optimizer}",
         "pip install bitsandbytes, or set trainer.optimizer=adamw"),
        (config.logging.tracker != "none", config.logging.tracker, f"logging.tracker={config.logging.tracker}",
         f"pip install {config.logging.tracker}, or set logging.tracker=none"),
    ]  # fmt: skip
    for is_wanted, package, key, fix in wanted:
        if is_wanted and importlib.util.find_spec(package) is None:
            raise MachineError(f"{key} needs {package}, which is not installed", fix=fix)


def _describe_source(key: str, path: str) -> str:
    if path.startswith(HUB_PREFIX):
        return f"{path}, read through `datasets`"
    found = matching_files(path)
    if not found:
        what = "no file matches" if is_glob(path) else "there is no file"
        raise InputError(f"{key}: {what} {resolve_data_path(path)}", fix=_data_fix(path))
    for file in found:
        refuse_special_file(f"{key}:", file)
    if len(found) == 1 and found[0].is_dir():
        return f"{found[0]}, a directory"
    size = sum(file.stat().st_size for file in found)
    return f"{found[0] if len(found) == 1 else f'{path}, {len(found):,} files'}, {size:,} bytes"


def _describe_base(path: str) -> str:
    directory = Path(path).expanduser()
    if (directory / "config.json").is_file():
        return f"{path}, a directory"
    if directory.is_dir():
        raise InputError(f"model.path: {path} has no config.json", fix="give the checkpoint's own directory")
    if directory.exists() or looks_like_directory(path):
        raise InputError(f"model.path: there is no directory {path}", fix=suggest_base(path))
    return f"{path}, a hub name (there is no such directory)"


def _data_fix(path: str) -> str:
    if "://" in path:
        return fix_for_missing_data(path) or "`shipped://` names a file of the toolkit's data/ folder"
    found = resolve_data_path(path)
    near = suggest_path(found, found.parent.iterdir()) if found.parent.is_dir() else None
    return near or f"paths are relative to the working directory, {Path.cwd()}"


def absolute_paths(config: RunConfig, start: Path) -> RunConfig:
    """Make a recipe's relative paths absolute, so that it means the same from any working directory.

    Args:
        config: the recipe. Names on the hub and `shipped://` paths stay; so does `output_dir`, which only places new
            runs.
        start: the directory that relative paths start at.
    """

    def absolute(path: str) -> str:
        return str(start / Path(path).expanduser())

    def of_sources(sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        return {
            name: source if "://" in source.path else replace(source, path=absolute(source.path))
            for name, source in sources.items()
        }

    data, model, adapter, experts = config.data, config.model, config.adapter, config.adapter.experts
    is_directory = (start / Path(model.path).expanduser()).is_dir()
    return replace(
        config,
        model=replace(model, path=absolute(model.path)) if is_directory else model,
        data=replace(
            data,
            train=of_sources(data.train),
            validation=of_sources(data.validation),
            test=of_sources(data.test),
            cache_dir=absolute(data.cache_dir) if data.cache_dir else None,
        ),
        adapter=replace(
            adapter,
            init_from=absolute(adapter.init_from) if adapter.init_from else None,
            experts=replace(
                experts,
                select=absolute(experts.select) if parse_select(experts.select).kind == "file" else experts.select,
                rank_by=absolute(experts.rank_by) if parse_rank_by(experts.rank_by).kind == "file" else experts.rank_by,
            ),
        ),
        export=replace(config.export, old_domain=of_sources(config.export.old_domain)),
    )
