"""Run the numerical tests as on other processors: every instruction set and thread count that can be chosen here.

    python scripts/instruction_sets.py                       tests of numbers under all settings; writes bench/results
    python scripts/instruction_sets.py --whole --setting avx2-1 --setting here-1       the whole suite under two
    python scripts/instruction_sets.py --list

ATEN_CPU_CAPABILITY chooses torch's own kernels, ONEDNN_MAX_CPU_ISA those of oneDNN, MKL_CBWR the branch of MKL's matrix
products (COMPATIBLE: SSE2, in another order of sums, with rounding 3.5 times as large over 2,880 products). Recorded is
how near each assertion about a number was to failing under each setting (`assertion_margins.py`). Ends with 1 if a test
fails anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# Tests whose results are floating-point numbers of the model, of kernels, adapters, losses or exports.
TESTS = (
    "tests/model/test_noise.py",
    "tests/model/test_model.py",
    "tests/model/test_base_storage.py::TestGradients",
    "tests/adapters/test_adapters.py::test_stock_peft_reads_it_back_in_a_fresh_process",
    "tests/adapters/test_adapters.py::test_read_back_notices_a_swap_that_shapes_do_not_show",
    "tests/adapters/test_adapters.py::test_lora_gradients_equal_autograd_through_pefts_dense_weights",
    "tests/adapters/test_router_adapter.py::test_stock_peft_reads_the_router_back",
    "tests/adapters/test_router_adapter.py::test_training_continues_from_a_saved_router",
    "tests/adapters/test_expert_ranks.py",
    "tests/adapters/test_update_norms.py",
    "tests/kernels/test_attention_reference.py",
    "tests/kernels/test_expert_block.py",
    "tests/kernels/test_flash.py",
    "tests/kernels/test_lora_experts.py",
    "tests/kernels/test_loss_head.py",
    "tests/objectives/test_preference.py",
    "tests/objectives/test_router_loss.py",
    "tests/objectives/test_trl.py",
    "tests/train/test_training_equivalence.py",
    "tests/train/test_optim.py",
    "tests/evaluate/test_scores.py",
    "tests/evaluate/test_generation.py",
    "tests/rounding/test_compensate.py",
)
NEAR = 0.25  # assertions that come this near to their limit anywhere are printed


@dataclass(frozen=True)
class Setting:
    """A processor to imitate: variables of the environment."""

    name: str
    variables: dict[str, str]


def _setting(name: str, threads: int, **variables: str) -> Setting:
    return Setting(f"{name}-{threads}", {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **variables})


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
SETTINGS = (
    _setting("here", 1),
    _setting("here", 2),
    _setting("avx512", 1, ATEN_CPU_CAPABILITY="avx512", ONEDNN_MAX_CPU_ISA="AVX512_CORE", MKL_CBWR="AVX512"),
    _setting("avx2", 1, **AVX2, MKL_CBWR="AVX2"),
    _setting("avx2", 2, **AVX2),
    _setting("default", 1, ATEN_CPU_CAPABILITY="default"),
    _setting("mkl-compatible", 1, MKL_CBWR="COMPATIBLE"),
    _setting("oldest", 1, **OLDEST),
    _setting("oldest", 2, **OLDEST),
)


@dataclass(frozen=True)
class Outcome:
    """Results of pytest under a setting.

    Attributes:
        summary: pytest's last line.
        failed: names of failed tests.
        margins: the nearest share of each assertion, by test and line.
        seconds: it took.
    """

    summary: str
    failed: tuple[str, ...]
    margins: dict[str, dict[str, Any]]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether pytest ran and every test passed."""
        return not self.failed and " passed" in self.summary and "error" not in self.summary


def run_tests(setting: Setting, tests: list[str]) -> Outcome:
    """Run pytest in a process that imitates this processor."""
    with tempfile.TemporaryDirectory() as scratch:
        margins = Path(scratch) / "margins.jsonl"
        environment = os.environ | setting.variables
        environment |= {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}",
            "PYTHONPYCACHEPREFIX": scratch,  # compiled tests do not know the hook otherwise
            "ASSERTION_MARGINS": str(margins),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
        command += ["-p", "assertion_margins", "-o", "enable_assertion_pass_hook=true", *tests]
        started = time.monotonic()
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = margins.read_text().splitlines() if margins.exists() else []
    output = done.stdout.strip().splitlines()
    return Outcome(
        summary=output[-1] if output else done.stderr.strip()[-200:],
        failed=tuple(match[1] for line in output if (match := re.match(r"(?:FAILED|ERROR) (\S+)", line))),
        margins=nearest(lines),
        seconds=time.monotonic() - started,
    )


def nearest(lines: list[str]) -> dict[str, dict[str, Any]]:
    """The line with the largest share, by test function and line number."""
    found: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, lines):
        test = re.sub(r"\[.*", "", line["test"])
        key = f"{test}:{line['line']}"
        if key not in found or line["share"] > found[key]["share"]:
            found[key] = line
    return found


def table(outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """Every assertion with its share under each setting, the nearest to failing first."""
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, outcome in outcomes.items():
        for key, margin in outcome.margins.items():
            row = rows[key]
            row.setdefault("where", key)
            row.setdefault("assertion", margin["assertion"])
            row.setdefault("share", {})[name] = float(f"{margin['share']:.3g}")
            row.setdefault("value", {})[name] = float(f"{margin['value']:.3g}")
    return sorted(rows.values(), key=lambda row: -max(row["share"].values()))


def show(rows: list[dict[str, Any]], outcomes: dict[str, Outcome]) -> None:
    """Print what varied between settings and came near."""
    for name, outcome in outcomes.items():
        print(f"{name:18} {outcome.summary}  ({outcome.seconds:.0f} s)")
        for test in outcome.failed:
            print(f"{'':18} FAILED {test}")
    varied = [row for row in rows if len(set(row["value"].values())) > 1]
    print(f"{len(rows)} assertions about numbers; {len(varied)} have other values under other settings")
    near = [row for row in varied if max(row["share"].values()) >= NEAR]
    print(f"{len(near)} of these came nearer than {NEAR:.0%} of the limit to it:")
    for row in near:
        low, high = min(row["share"].values()), max(row["share"].values())
        print(f"  {low:5.2f} to {high:5.2f} of the limit  {row['where']}  {row['assertion'][:70]}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="other tests, as pytest takes them")
    parser.add_argument("--setting", action="append", choices=[s.name for s in SETTINGS], help="may be repeated")
    parser.add_argument("--whole", action="store_true", help="the whole suite")
    parser.add_argument("--slow", action="store_true", help="with the tests that are marked slow")
    parser.add_argument("--jobs", type=int, default=1, help="settings tried at once (default: 1)")
    parser.add_argument("--list", action="store_true", help="print settings and tests")
    parser.add_argument("--out", type=Path, help="(default: bench/results/DATE-instruction-sets.json)")
    return parser.parse_args()


def main() -> None:
    """Run, print, write, and end with 1 on a failure."""
    args = parse_arguments()
    settings = [s for s in SETTINGS if not args.setting or s.name in args.setting]
    tests = args.tests or (["tests"] if args.whole else list(TESTS))
    if args.list:
        print("\n".join([*(f"{s.name:18} {s.variables}" for s in settings), *tests]))
        return
    if not args.slow:
        tests += ["-m", "not slow"]
    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for setting, outcome in zip(settings, pool.map(lambda s: run_tests(s, tests), settings), strict=True):
            outcomes[setting.name] = outcome
            print(f"{setting.name}: {outcome.summary}", file=sys.stderr, flush=True)
    rows = table(outcomes)
    show(rows, outcomes)
    name = f"{date.today()}-instruction-sets{'-whole' if args.whole else ''}.json"
    out = args.out or ROOT / "bench" / "results" / name
    content = {
        "torch": torch.__version__,
        "here": torch.backends.cpu.get_cpu_capability(),
        "settings": {setting.name: setting.variables for setting in settings},
        "results": {name: {"summary": outcome.summary, "failed": outcome.failed} for name, outcome in outcomes.items()},
        "assertions": rows,
    }
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(out)
    sys.exit(0 if all(outcome.passed for outcome in outcomes.values()) else 1)


if __name__ == "__main__":
    main()
