"""Estimated against measured memory of an optimiser step: `python bench/estimate.py [--base 20b 120b]`.

On a GPU: bases of the published shapes with random packed weights, made tensor by tensor (no download), one real step
with the allocator's peak beside the estimate's parts, and the routed tokens of the busiest chunk of experts. On a CPU:
the small bases of `tests/tracked_step.py`, every tensor counted. Prints a table, then JSON with hardware, versions and
commit.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "estimate")]

from test_estimate_step import CASES, reference_step  # noqa: E402
from tracked_step import busiest_chunks, full_batch, measure, recipe, write_base  # noqa: E402

from finetune.adapters.attach import attach_adapter  # noqa: E402
from finetune.arch import Arch  # noqa: E402
from finetune.config.compose import compose  # noqa: E402
from finetune.config.paths import shipped_dir  # noqa: E402
from finetune.estimate.inputs import find_base, step_profile  # noqa: E402
from finetune.estimate.memory import CONTEXT, PROCESS, SLACK, estimate_memory  # noqa: E402
from finetune.model.build import build_base  # noqa: E402
from finetune.model.forward import checkpoint_activations  # noqa: E402
from finetune.train.engines.base import single_engine  # noqa: E402
from finetune.train.optim import make_optimizer  # noqa: E402
from finetune.train.step import OptimiserStep  # noqa: E402

GIB = 2**30
OVERHEAD = (CONTEXT, PROCESS, SLACK)
ROW = "{:42} {:>10} {:>10} {:>8}  {}"


class RandomCheckpoint:
    """Substitute for a `Checkpoint` of published dims; tensors are random and created when read."""

    def __init__(self, name: str) -> None:
        file = shipped_dir("data") / "tokenizer" / f"gpt-oss-{name}" / "config.json"
        self.config: dict[str, Any] = json.loads(file.read_text())
        self.shape = Arch.from_config(self.config, str(file))
        self.directory = file.parent
        self.tensors = self.entries = self.shape.expected_tensors()

    def names(self) -> list[str]:
        return list(self.tensors)

    def dtype(self, name: str) -> str:
        return self.tensors[name][0]

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def read(self, name: str) -> torch.Tensor:
        dtype, shape = self.tensors[name]
        if dtype == "U8":
            low, high = (118, 122) if name.endswith("_scales") else (0, 256)
            return torch.randint(low, high, shape, dtype=torch.uint8)
        return torch.randn(shape, dtype=torch.bfloat16) * 0.02


def on_gpu(name: str, overrides: list[str]) -> dict[str, Any]:
    """One step of a published shape: the allocator's peak against the estimate."""
    config = compose(f"legal_{name}", overrides).config
    facts = find_base(f"openai/gpt-oss-{name}")
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    base = build_base(RandomCheckpoint(name), device, torch.bfloat16, config.model.experts_per_chunk)
    adapter = attach_adapter(base, config.adapter, seed=0)
    if config.trainer.activation_checkpointing:
        checkpoint_activations(base.model)
    parameters = adapter.parameters()
    step = OptimiserStep(
        config.trainer,
        base,
        single_engine(parameters, make_optimizer(parameters, config.trainer), config.trainer),
    )
    batches = [full_batch(config, base.model.config.vocab_size, 1.0)] * config.trainer.gradient_accumulation_steps
    busiest = max(busiest_chunks(base, batches[0]))
    for number in (1, 2):
        torch.cuda.reset_peak_memory_stats(device)
        step(batches, 1e-4, number)
    shape = replace(
        step_profile(config, facts.arch, on_gpu=True),
        longest_example=config.data.max_length // 2,
        busiest_chunk=busiest,
    )
    estimate = estimate_memory(facts.arch, shape)
    return {
        "case": f"{name} {' '.join(overrides)}".strip(),
        "estimated_bytes": round(estimate.step_bytes),
        "measured_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "busiest_chunk": round(busiest, 3),
        "moment": estimate.peak_moment,
        "parts": {part.name: round(part.num_bytes) for part in estimate.at_peak() if part.name not in OVERHEAD},
    }


def on_cpu() -> list[dict[str, Any]]:
    """Figures of the test's cases."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for case, (base_name, _, settings) in CASES.items():
            directory = Path(scratch) / base_name
            if not directory.exists():
                write_base(directory, base_name)
            config = recipe(directory, **settings)
            measured = measure(directory, config)
            step = reference_step(config, directory, measured.busiest_chunk)
            estimate = estimate_memory(find_base(str(directory)).shape, step)
            results.append(
                {
                    "case": case,
                    "estimated_bytes": round(estimate.step_bytes),
                    "measured_bytes": measured.peak_bytes,
                    "busiest_chunk": round(measured.busiest_chunk, 3),
                    "moment": estimate.peak_moment,
                }
            )
            show(results[-1])
    return results


def show(result: dict[str, Any]) -> None:
    estimated, measured = result["estimated_bytes"], result["measured_bytes"]
    off = f"{estimated / measured - 1:+.1%}"
    print(
        ROW.format(result["case"], f"{estimated / GIB:.4f}", f"{measured / GIB:.4f}", off, result["moment"]), flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", nargs="+", default=["20b", "120b"], choices=["20b", "120b"], help="shapes, on a GPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of legal_20b and legal_120b, on a GPU")
    args = parser.parse_intermixed_args()
    print(ROW.format("case", "est. GiB", "meas. GiB", "off", "peak at"))
    if torch.cuda.is_available():
        results = []
        for name in args.base:
            results.append(on_gpu(name, args.overrides))
            show(results[-1])
            torch.cuda.empty_cache()
    else:
        results = on_cpu()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    facts = {"device": device, "torch": torch.__version__, "commit": commit.stdout.strip(), "command": sys.argv}
    print(json.dumps(facts | {"results": results}, indent=2))


if __name__ == "__main__":
    main()
