"""Helpers for tests of whole runs on a very small set-up; `conftest.py` has their fixtures."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.paths import shipped_dir
from finetune.train.checkpoint import load_newest
from finetune.train.metrics import MetricsLog

Train = Callable[..., tuple[int, Path]]
"""Runs the command in this process with overrides; gives its exit code and run directory."""

TIMING = ("tokens_per_second", "memory_gib")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "finetune.json")
RECIPE = """# @package _global_
defaults:
  - override /model: tiny
  - override /data: own
model: {path: %(base)s}
data:
  train: {mine: {path: %(rows)s/train.jsonl}}
  validation: {mine: {path: %(rows)s/validation.jsonl}}
  test: {mine: {path: %(rows)s/test.jsonl}}
  max_length: 700
adapter: {attention: {rank: 4}, experts: {rank: 4}}
# Adam's epsilon: below it, the sign of a rounding error would decide a whole step, and runs that differ in the order of
# sums alone would part.
trainer: {epochs: 2, max_steps: 8, gradient_accumulation_steps: 2, learning_rate: 1.0e-2, adam_eps: 1.0e-6}
evaluate: {every_steps: 3, routing_examples: 0}
export: {read_back: never}
"""


def make_workplace(directory: Path, base: Path) -> Path:
    """Write a recipe, small.yaml, and 40 real rows with three different answers into a directory."""
    with gzip.open(shipped_dir("data") / "legal" / "cuad_clause_type.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [line for line in file if len(line) < 2200]
    wanted = ("License Grant", "Audit Rights", "Governing Law")
    lines = [line for line in lines if json.loads(line)["answer"] in wanted][:40]
    assert {json.loads(line)["answer"] for line in lines[31:]} == set(wanted)
    for name, part in (("train", lines[:24]), ("validation", lines[24:30]), ("test", lines[30:])):
        (directory / f"{name}.jsonl").write_text("".join(part))
    (directory / "small.yaml").write_text(RECIPE % {"base": base, "rows": directory})
    return directory


def finetune(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from finetune.cli.main import entry; entry()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_steps(process: subprocess.Popen[str], run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"step", ') >= count:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no step {count} in {run}: {process.communicate()[1]}")


def manifest_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return content


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def tensors_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_same_run(one: Path, other: Path) -> None:
    """Everything that training decides is the same to the last bit."""
    assert metrics_of(one) == metrics_of(other)
    (step_one, state_one), (step_other, state_other) = (
        load_newest(one / "checkpoints"),
        load_newest(other / "checkpoints"),
    )
    assert step_one == step_other
    assert tensors_equal(state_one.adapter, state_other.adapter)
    assert tensors_equal(state_one.optimizer, state_other.optimizer)
    loops = [
        {key: value for key, value in s.state["loop"].items() if key != "seconds"} for s in (state_one, state_other)
    ]
    assert loops[0] == loops[1]
    weights = "adapter/adapter_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def signal_after(
    monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals, *, times: int = 1, kind: str = "step"
) -> None:
    """Send this process a signal right after a line is written."""
    append = MetricsLog.append

    def append_and_signal(self: MetricsLog, line_kind: str, line_step: int, **figures: Any) -> None:
        append(self, line_kind, line_step, **figures)
        if (line_kind, line_step) == (kind, step):
            for _ in range(times):
                signal.raise_signal(number)

    monkeypatch.setattr(MetricsLog, "append", append_and_signal)
