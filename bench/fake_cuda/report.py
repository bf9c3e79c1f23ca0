"""Count a recipe's step, and show it: the parts of a step, micro-batch sizes, and the counts that a test holds."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import machine, publish

from fake_cuda.counts import Counts
from fake_cuda.rates import GPUS, UNCERTAINTY, Part, parts_of, step_seconds
from fake_cuda.step import Work, count_step
from finetune.arch import Arch
from finetune.config.compose import compose
from finetune.config.schema import RunConfig
from finetune.estimate.inputs import step_profile
from finetune.estimate.memory import estimate_memory

NOTE = (
    f"Arithmetic, not measured: exact counts on fake CUDA tensors, times by the rates of bench/fake_cuda/rates.py "
    f"(within {UNCERTAINTY:.0%})."
)
COUNTED_LAYERS = 2  # one of each kind; a test has no time for more
COUNTED = {
    "legal_20b": ("20b", []),
    "legal_120b": ("120b", []),
    "legal_20b, 8-bit states in host memory": ("20b", ["trainer.optimizer_states_on_cpu=true"]),
}


def work_of(options: argparse.Namespace) -> Work:
    """The step that the command line asks for."""
    recipe = options.recipe or f"legal_{options.shape}"
    work = recipe_work(options.shape, recipe, options.overrides)
    return replace(
        work,
        example=options.example or work.length,
        trained_share=options.trained,
        layers=options.layers,
        adapted=options.adapted,
    )


def recipe_work(shape: str, recipe: str, overrides: list[str]) -> Work:
    """A recipe's step at a published shape, every token trained, one example per sequence."""
    config = compose(recipe, overrides).config
    trainer = config.trainer
    size, length = trainer.micro_batch_size, config.data.max_length
    return Work(shape, config, size, length, length, 1.0, trainer.gradient_accumulation_steps)


def print_step(work: Work, gpu_name: str, *, save: bool) -> None:
    """Print one step: its parts, waits, peak and rate."""
    counts, gpu = count_step(work), GPUS[gpu_name]
    rows = [_row(name, part) for name, part in parts_of(counts, gpu).items()]
    device, total = step_seconds(counts, gpu)
    rows.append({"part": "total on the device", "ms": round(device * 1e3, 1)})
    rows.append({"part": "total with the host", "ms": round(total * 1e3, 1), "tokens/s": round(work.tokens / total)})
    title = f"Cost model: {work.shape}, {gpu_name}, {work.micro_batches} x {work.sequences} x {work.length:,} tokens"
    facts = machine(torch.device("cpu"))
    waits = ", ".join(f"{count} in {line}" for line, count in counts.waits.items())
    note = f"{NOTE} Host waits: {waits}. {_memory_line(work, counts)}"
    raw = {"launches": _launches(counts), "waits": dict(counts.waits), "peak_bytes": counts.peak_bytes}
    publish(f"cost-model-{work.shape}-{gpu_name}", title, facts, rows, save=save, note=note, raw=raw)


def _row(name: str, part: Part) -> dict[str, Any]:
    return {
        "part": name,
        "launches": part.launches,
        "GB": round(part.num_bytes / 1e9, 1),
        "TFLOP": round(part.flops / 1e12, 2),
        "ms": round(part.seconds * 1e3, 1),
    }


def _launches(counts: Counts) -> dict[str, int]:
    launches: Counter[str] = Counter()
    for call, cost in counts.costs.items():
        launches[call.phase] += cost.launches
    return dict(launches)


def estimated_bytes(work: Work) -> float:
    """What `finetune estimate` says of the same step's tensors, without context and allocator slack."""
    arch = Arch.from_config(work.model_config(), "config.json")
    profile = step_profile(_with_step(work), arch, on_gpu=True)
    return estimate_memory(arch, replace(profile, busiest_chunk=1.0)).step_bytes


def _with_step(work: Work) -> RunConfig:
    trainer = replace(
        work.config.trainer, micro_batch_size=work.sequences, gradient_accumulation_steps=work.micro_batches
    )
    return replace(work.config, trainer=trainer)


def _memory_line(work: Work, counts: Counts) -> str:
    estimated = estimated_bytes(work)
    ratio = estimated / counts.peak_bytes
    return (
        f"Peak of tensors {counts.peak_bytes / 1e9:.2f} GB ({counts.peak_at}); "
        f"finetune estimate says {estimated / 1e9:.2f} GB, {ratio:.3f} of it."
    )


def print_micro_batches(work: Work, gpu_name: str) -> None:
    """Print the rate of the same optimiser step at every micro-batch size that divides it."""
    gpu, total = GPUS[gpu_name], work.sequences * work.micro_batches
    for size in (size for size in range(1, total + 1) if total % size == 0):
        variant = replace(work, sequences=size, micro_batches=total // size)
        counts = count_step(variant)
        _, seconds = step_seconds(counts, gpu)
        mark = " <- the recipe's" if size == work.sequences else ""
        fits = "fits" if counts.peak_bytes * 1.05 + 0.75e9 <= gpu.gigabytes * 1e9 else "does not fit"
        print(
            f"{total // size} x {size}: {work.tokens / seconds:8,.0f} tokens/s, peak of tensors "
            f"{counts.peak_bytes / 1e9:.1f} GB, {fits}{mark}"
        )


# Counts that a test holds


def counted(name: str) -> dict[str, Any]:
    """The counts of one entry of `COUNTED`, over a few layers: exact, the same everywhere with one version of torch."""
    counts = count_step(_counted_work(name))
    parts = parts_of(counts, GPUS["h100"])
    return {
        "launches": _launches(counts),
        "waits": dict(sorted(counts.waits.items())),
        "uploads": dict(sorted(counts.uploads.items())),
        "peak_bytes": counts.peak_bytes,
        "megabytes": {part: round(cost.num_bytes / 1e6) for part, cost in sorted(parts.items())},
        "gigaflops": {part: round(cost.flops / 1e9) for part, cost in sorted(parts.items()) if cost.flops},
    }


def estimated_bytes_of(name: str) -> float:
    """`estimated_bytes` of one entry of `COUNTED`."""
    return estimated_bytes(_counted_work(name))


def _counted_work(name: str) -> Work:
    shape, overrides = COUNTED[name]
    return replace(recipe_work(shape, name.split(",")[0], overrides), layers=COUNTED_LAYERS)


def all_counts(path: Path) -> dict[str, Any]:
    """The stored counts with those of this version of torch made anew."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return stored | {_version(): {name: counted(name) for name in COUNTED}}


def _version() -> str:
    return torch.__version__.split("+")[0]
