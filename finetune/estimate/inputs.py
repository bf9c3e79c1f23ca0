"""Inputs of an estimate: a base's dimensions, and the settings of a recipe that decide how much memory a step takes.

The config.json of 20b and 120b ship with the toolkit, so nothing has to be downloaded first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.arch import Arch
from finetune.config.expert_selection import highest_rank, parse_select, read_expert_scores
from finetune.config.paths import shipped_dir
from finetune.config.schema import RunConfig

PUBLISHED = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
# Routed tokens of the busiest chunk over the average chunk's: 1 + this / sqrt(experts in a chunk), since popular
# experts even out among many. A guess until a run on a real base measures it; bench/estimate.py prints what it finds.
CROWDING = 1.5


@dataclass(frozen=True)
class BaseInfo:
    """A base, known from its config.json.

    Attributes:
        name: as the recipe gives it.
        arch: its dimensions.
        source: where they were read.
        file_bytes: total size of its safetensors files if they are here; None: they would be downloaded.
    """

    name: str
    arch: Arch
    source: str
    file_bytes: int | None


def find_base(path: str) -> BaseInfo | None:
    """Read the dimensions of a recipe's base, without its weights.

    Args:
        path: `model.path`: a directory with config.json, or a published hub name.

    Returns:
        None for a hub name that is not one of `PUBLISHED`: its config.json is not known before it is downloaded.

    Raises:
        InputError: config.json is there and cannot be used.
    """
    directory = Path(path).expanduser()
    if (directory / "config.json").is_file():
        files = list(directory.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) or None
        return BaseInfo(path, Arch.read(directory / "config.json"), str(directory / "config.json"), size)
    if path not in PUBLISHED:
        return None
    file = shipped_dir("data") / "tokenizer" / path.removeprefix("openai/") / "config.json"
    return BaseInfo(path, Arch.read(file), "the published config.json", None)


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """One micro-batch's computation, and the settings that cost or save memory.

    Attributes:
        on_gpu: estimated for a GPU; otherwise for the reference path on a CPU.
        sequences, sequence_tokens: packed sequences in a micro-batch, and tokens in each.
        longest_example: tokens in the longest example of a sequence; decides attention's workspace.
        accumulation_steps: micro-batches per optimiser step; from the second one on, gradients exist throughout.
        trained_share: share of the tokens that carry loss; decides the loss head's workspace.
        busiest_chunk: routed tokens of the busiest chunk of experts over the average chunk's.
        compute_bytes: of an activation, and of every weight that is not packed.
        expert_storage, attention_storage, embedding_on_cpu: format and place of the base's weights.
        experts_per_chunk: experts dequantised at a time.
        expert_kernel, attention_kernel: `triton` and `flash`; `reference` is plain PyTorch.
        attention_rank, attention_targets, expert_rank, adapted_layers: the adapter's sites. Where experts' ranks
            differ, `expert_rank` is their mean.
        adapted_experts: number of adapted experts in each adapted layer.
        highest_rank: of any expert.
        shared_factor: the factor that a layer's experts share: `a`, `b` or `none`.
        router_parameters: trained ones of one layer's router.
        adapter_bytes, gradient_bytes: of a LoRA parameter and of its gradient.
        optimizer, states_on_cpu: the optimiser, and whether its states are in host memory.
        checkpointing, offload: layers are recomputed in the backward pass; their inputs are kept in host memory.
        kind, world_size: of distributed training.
    """

    on_gpu: bool
    sequences: int
    sequence_tokens: int
    longest_example: int
    accumulation_steps: int
    trained_share: float = 1.0
    busiest_chunk: float
    compute_bytes: Literal[2, 4]
    expert_storage: str
    attention_storage: str
    embedding_on_cpu: bool
    experts_per_chunk: int
    expert_kernel: str
    attention_kernel: str
    attention_rank: int
    attention_targets: tuple[str, ...]
    expert_rank: int
    adapted_layers: int
    adapted_experts: tuple[int, ...]
    highest_rank: int
    shared_factor: str
    router_parameters: int
    adapter_bytes: Literal[2, 4]
    gradient_bytes: Literal[2, 4]
    optimizer: str
    states_on_cpu: bool
    checkpointing: bool
    offload: bool
    kind: str
    world_size: int

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch, padding included."""
        return self.sequences * self.sequence_tokens


def step_profile(config: RunConfig, arch: Arch, *, on_gpu: bool) -> StepProfile:
    """Take from a recipe everything its memory depends on.

    Args:
        config: the checked recipe.
        arch: for what a recipe leaves open (all layers, all experts).
        on_gpu: whether it will run on one.
    """
    first, last = config.adapter.layers or (0, arch.num_layers - 1)
    dtype = config.model.compute_dtype
    return StepProfile(
        on_gpu=on_gpu,
        sequences=config.trainer.micro_batch_size,
        sequence_tokens=config.data.max_length,
        longest_example=config.data.max_length,
        accumulation_steps=config.trainer.gradient_accumulation_steps,
        busiest_chunk=1 + CROWDING / math.sqrt(config.model.experts_per_chunk),
        compute_bytes=4 if dtype == "float32" or (dtype == "auto" and not on_gpu) else 2,
        expert_storage=config.model.expert_storage,
        attention_storage=config.model.attention_storage,
        embedding_on_cpu=config.model.embedding_on_cpu,
        experts_per_chunk=min(config.model.experts_per_chunk, arch.num_experts),
        expert_kernel=_resolved(config.model.expert_kernel, "triton" if on_gpu else "reference"),
        attention_kernel=_resolved(config.model.attention_kernel, "flash"),
        attention_rank=config.adapter.attention.rank,
        attention_targets=config.adapter.attention.targets,
        expert_rank=config.adapter.experts.rank,
        adapted_layers=max(0, min(last, arch.num_layers - 1) - first + 1),
        adapted_experts=_adapted_experts(config.adapter.experts.select, arch, first, last),
        highest_rank=highest_rank(config.adapter.experts),
        shared_factor=config.adapter.experts.share,
        router_parameters=_router_parameters(config, arch),
        adapter_bytes=2 if config.adapter.dtype == "bfloat16" else 4,
        gradient_bytes=2 if config.trainer.gradient_dtype == "bfloat16" else 4,
        optimizer=config.trainer.optimizer,
        states_on_cpu=config.trainer.optimizer_states_on_cpu,
        checkpointing=config.trainer.activation_checkpointing,
        offload=config.trainer.activation_offload,
        kind=config.distributed.kind,
        world_size=config.distributed.num_processes,
    )


def _resolved(chosen: str, automatic: str) -> str:
    """A kernel's name, with `auto` resolved."""
    return automatic if chosen == "auto" else chosen


def _router_parameters(config: RunConfig, arch: Arch) -> int:
    router = config.adapter.router
    lora = router.rank * (arch.hidden + arch.num_experts)
    return {"lora": lora, "full": arch.router_parameters}.get(router.mode, 0)


def _adapted_experts(select: str, arch: Arch, first: int, last: int) -> tuple[int, ...]:
    """Adapted experts of each layer. Their number under `top_p` is known only at run time, so all are counted.

    Raises:
        ConfigError, InputError: `select` names a file that is missing or of another kind.
    """
    layers = range(first, min(last, arch.num_layers - 1) + 1)
    rule = parse_select(select)
    if rule.kind == "file":
        selected = read_expert_scores(Path(rule.path).expanduser()).selected
        return tuple(len(selected.get(layer, ())) for layer in layers)
    count = min(rule.top_k, arch.num_experts) if rule.kind == "top_k" else arch.num_experts
    return (count,) * len(layers)
