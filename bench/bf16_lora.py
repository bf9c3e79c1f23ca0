"""Compare LoRA parameters in bfloat16 and float32: loss curves over seeds, on the constructed tiny base.

    python bench/bf16_lora.py [--steps 100] [--seeds 0 1 2] [--rate 1e-3] [--out FILE]

Every variant sees the same examples in the same order from the same initial adapter, seed by seed, so that differences
are paired. `nearest` is the control: torch's AdamW on bfloat16 parameters, which loses updates below half a step.
Printed: the mean training loss of the curve's thirds, held-out loss after training, and each one's distance from
float32 beside the spread over seeds. On a CPU, in float32 arithmetic.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import log
from finetune.config.compose import compose
from finetune.config.schema import RunConfig
from finetune.evaluate.evalset import evenly_spread
from finetune.evaluate.likelihood import held_out_loss
from finetune.train.engines.base import single_engine
from finetune.train.optim import learning_rate, make_optimizer
from finetune.train.session import open_session
from finetune.train.step import OptimiserStep
from finetune.train.trainer import seed_step

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from constructed_base import write_constructed_base  # noqa: E402

BFLOAT16 = ("adapter.dtype=bfloat16",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16": BFLOAT16,
    "bfloat16, 8-bit moments, bfloat16 gradients": (
        *BFLOAT16,
        "trainer.optimizer=adamw_8bit",
        "trainer.gradient_dtype=bfloat16",
    ),
    "float32, 8-bit moments": ("trainer.optimizer=adamw_8bit",),
    "nearest (control)": BFLOAT16,
}
CONTROL = "nearest (control)"


def curve(config: RunConfig, *, control: bool) -> tuple[list[float], float]:
    """Train; returns the loss of each step and the held-out loss after the last, nats per trained token."""
    session = open_session(config)
    base, parameters, total = session.base, session.adapter.parameters(), session.plan.total_steps
    optimizer = nearest(parameters, config) if control else make_optimizer(parameters, config.trainer, seed=config.seed)
    step = OptimiserStep(config.trainer, base, single_engine(parameters, optimizer, config.trainer))
    losses, position = [], 0
    while position < total:
        epoch, index = session.plan.position(position)
        batches = [session.plan.batch(micro) for micro in session.plan.steps(epoch)[index]]
        seed_step(config.seed, position, 0)
        losses.append(step(batches, learning_rate(position, total, config.trainer), position + 1).loss)
        position += 1
    base.model.eval()
    samples = evenly_spread(session.splits["validation"].examples, config.evaluate.validation_examples)
    return losses, held_out_loss(base.model, samples, config.data.max_length, task="held out").mean


def nearest(parameters: dict[str, nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """Update bfloat16 parameters with torch's own AdamW: moments and updates rounded to nearest."""
    trainer = config.trainer
    betas = (trainer.adam_beta1, trainer.adam_beta2)
    return torch.optim.AdamW(parameters.values(), betas=betas, eps=trainer.adam_eps, weight_decay=0.0)


def summary(curves: dict[str, list[list[float]]], held_out: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One line per variant: means over seeds, paired differences from float32, and the spread over seeds."""
    lines = []
    for name, runs in curves.items():
        third = len(runs[0]) // 3
        thirds = [statistics.mean(statistics.mean(run[n * third : (n + 1) * third]) for run in runs) for n in range(3)]
        differences = [ours - theirs for ours, theirs in zip(held_out[name], held_out["float32"], strict=True)]
        last = [statistics.mean(run[-third:]) for run in runs]
        reference = [statistics.mean(run[-third:]) for run in curves["float32"]]
        lines.append(
            {
                "variant": name,
                "loss_thirds": [round(loss, 4) for loss in thirds],
                "held_out": round(statistics.mean(held_out[name]), 4),
                "held_out_minus_float32": [round(value, 4) for value in differences],
                "last_third_minus_float32": [round(a - b, 4) for a, b in zip(last, reference, strict=True)],
            }
        )
    return lines


def table(lines: list[dict[str, Any]], spread: float) -> str:
    """The figures as Markdown."""
    rows = [
        "| variant | loss, first / middle / last third | held out | minus float32, seed by seed |",
        "|---|---|---|---|",
    ]
    for line in lines:
        thirds = " / ".join(f"{loss:.4f}" for loss in line["loss_thirds"])
        differences = ", ".join(f"{value:+.4f}" for value in line["held_out_minus_float32"])
        rows.append(f"| {line['variant']} | {thirds} | {line['held_out']:.4f} | {differences} |")
    return "\n".join(
        [*rows, "", f"float32's held-out loss varies by {spread:.4f} (standard deviation) from seed to seed."]
    )


def main() -> None:
    """Run all variants and print JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.monotonic()
    curves: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    held_out: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "tiny"
        write_constructed_base(base, seed=0)
        with log.Progress("variants", len(VARIANTS) * len(args.seeds), "runs") as progress:
            for seed in args.seeds:
                for name, overrides in VARIANTS.items():
                    settings = (
                        f"model.path={base}", "data.max_length=512", "data.too_long=drop", f"seed={seed}",
                        f"trainer.max_steps={args.steps}", f"trainer.learning_rate={args.rate}",
                        "trainer.gradient_accumulation_steps=2", "evaluate.validation_examples=60", *overrides,
                    )  # fmt: skip
                    losses, loss = curve(compose("quickstart", settings).config, control=name == CONTROL)
                    curves[name].append(losses)
                    held_out[name].append(loss)
                    progress.advance()
    spread = statistics.stdev(held_out["float32"]) if len(args.seeds) > 1 else 0.0
    lines = summary(curves, held_out)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    result = {
        "command": "python bench/bf16_lora.py " + " ".join(sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "minutes": round((time.monotonic() - started) / 60, 1),
        "float32_spread": round(spread, 4),
        "variants": lines,
        "curves": {name: [[round(loss, 4) for loss in run] for run in runs] for name, runs in curves.items()},
    }
    print(json.dumps({key: value for key, value in result.items() if key != "curves"}, indent=1))
    print(table(lines, spread))
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
