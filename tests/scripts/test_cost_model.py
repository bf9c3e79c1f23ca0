"""The cost model's counts are those committed: a change that adds a host wait, a copy or launches is seen in review."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "bench/results/cost-model-counts.json").read_text(encoding="utf-8"))
TORCH = importlib.metadata.version("torch")
UPDATE = "if the change is meant: python bench/cost_model.py --counts, and say in the commit what it costs"
PROGRAM = """
import sys, json
sys.path.insert(0, "bench")
from fake_cuda.device import load_guard, one_gpu
load_guard()
with one_gpu((9, 0)):
    from fake_cuda import report
    print(json.dumps({"counts": report.counted(sys.argv[1]), "estimated": report.estimated_bytes_of(sys.argv[1])}))
"""

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: fake CUDA tensors need a compiled device guard"),
    pytest.mark.skipif("+cpu" not in TORCH, reason="fake CUDA tensors need a CPU build of torch"),
    pytest.mark.skipif(TORCH.split("+")[0] not in STORED, reason=f"no counts are committed for torch {TORCH}"),
]


@pytest.mark.parametrize("name", STORED.get(TORCH.split("+")[0], {}))
def test_counts_are_the_committed_ones_and_the_estimate_is_near_the_peak(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    stored = STORED[TORCH.split("+")[0]][name]
    assert found["counts"] == stored, UPDATE
    assert 0.95 <= found["estimated"] / stored["peak_bytes"] <= 1.05, "finetune estimate against the counted peak"
