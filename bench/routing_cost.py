"""Cost of counting expert use in a training step: `python bench/routing_cost.py`.

Trains the same micro-batches with counting on and off in turn, so that other load affects both alike, and
compares medians (of processor time on a CPU, which excludes other programs' load); and times the counting alone.
`--base` takes any checkpoint; without it a tiny one is made.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from finetune import log
from finetune.adapters.attach import attach_adapter
from finetune.config.schema import AdapterConfig, ModelConfig, TrainerConfig
from finetune.data.batches import Batch, collate
from finetune.data.harmony.render import Example
from finetune.model.build import build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import RouterOutput, checkpoint_activations
from finetune.model.hub import locate_base
from finetune.model.open import choose_device, choose_dtype
from finetune.model.tiny import write_tiny_base
from finetune.model.usage import UsageCounter
from finetune.train.engines.base import single_engine
from finetune.train.optim import make_optimizer
from finetune.train.step import OptimiserStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="a checkpoint's directory or hub name; default: a tiny one")
    parser.add_argument("--tokens", type=int, default=1024, help="in a micro-batch")
    parser.add_argument("--steps", type=int, default=12, help="with and without, each")
    parser.add_argument("--out", type=Path, help="write the result as JSON too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.base is None:
            args.base = str(Path(scratch) / "tiny")
            write_tiny_base(Path(args.base), seed=0, kind="random")
        result = measure(args.base, args.tokens, args.steps)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(name: str, tokens: int, steps: int) -> dict[str, object]:
    checkpoint = Checkpoint.open(locate_base(name, None).directory)
    config = ModelConfig(path=name)
    device = choose_device(config)
    base = build_base(checkpoint, device, choose_dtype(config, device), config.experts_per_chunk)
    adapter = attach_adapter(base, AdapterConfig(), seed=0)
    checkpoint_activations(base.model)
    trainer = TrainerConfig(gradient_accumulation_steps=1)
    parameters = adapter.parameters()
    step = OptimiserStep(
        trainer, base, single_engine(parameters, make_optimizer(parameters, trainer), trainer), adapter
    )
    ids = np.random.default_rng(0).integers(0, 199_998, tokens).astype(np.int32)
    weights = np.ones(tokens, dtype=np.float32)
    weights[0] = 0
    batch = collate([[Example(ids, weights, "random", "nowhere:1")]])
    seconds = _times(step, batch, steps)
    with_count, without = (statistics.median(seconds[flag]) for flag in (True, False))
    alone = _alone(base.checkpoint.arch.num_layers, base.checkpoint.arch.num_experts, tokens)
    return {
        "machine": f"{platform.processor() or platform.machine()}, {device}",
        "base": name if not name.startswith("/tmp") else "tiny",
        "tokens": tokens,
        "steps_each": steps,
        "seconds_with": round(with_count, 4),
        "seconds_without": round(without, 4),
        "share_of_a_step_by_difference": round((with_count - without) / without, 4),
        "share_of_a_step_by_count_alone": round(alone / 1000 / without, 6),
        "count_alone_milliseconds": alone,
        "count_alone_milliseconds_20b_4096_tokens": _alone(24, 32, 4096),
        "count_alone_milliseconds_120b_4096_tokens": _alone(36, 128, 4096),
    }


def _now() -> float:
    """Seconds: of this process on a CPU, of the wall where a GPU is waited for."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _times(step: OptimiserStep, batch: Batch, steps: int) -> dict[bool, list[float]]:
    count: Callable[..., None] = step.usage.add
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with log.Progress("training", 2 * steps, "steps") as progress:
        for number in range(2 * steps + 2):
            counted = number % 2 == 0
            step.usage.add = count if counted else lambda *_: None  # type: ignore[method-assign]
            started = _now()
            step([batch], 1e-4, number + 1)
            if number >= 2:  # the first of each warms up
                seconds[counted].append(_now() - started)
                progress.advance()
    return seconds


def _alone(num_layers: int, num_experts: int, tokens: int) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counter = UsageCounter(num_layers, num_experts, 1, device)
    top = torch.randn(tokens, num_experts, device=device).topk(4)
    layers = [RouterOutput(top.values, top.indices, top.values.softmax(-1))] * num_layers
    rows, seconds = torch.arange(tokens, device=device), []
    for _ in range(10):
        started = _now()
        counter.add(layers, rows)
        seconds.append(_now() - started)
    return round(statistics.median(seconds) * 1000, 3)


if __name__ == "__main__":
    main()
