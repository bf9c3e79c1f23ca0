"""Compare kinds of adapter on one base: attention, experts, ranks, routers, at equal parameters and at equal time.

    python bench/compare.py --base DIRECTORY --work DIRECTORY [--minutes N] [--save NAME]
    python bench/compare.py --base 20b --work DIRECTORY --save compare-20b      (or 120b; a GPU; days)

First every kind is trained at each learning rate with the first seed, and the rate with the least validation loss is
taken (first table); test examples are scored with that rate only, over all seeds (second table). Every run is `finetune
train` in a child process. Runs are stored below --work by their settings: the program resumes where it was stopped, and
--minutes starts no work after that time. Exit status 1: a control that can learn nothing beats the most frequent
answer.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from compare_plan import LARGE_20B, LARGE_120B, TINY, BaseName, Line, Run, Setting, plan, variants
from compare_run import Runner
from compare_table import RATES_NOTE, TEST_NOTE, Finished, Trials, best_rate, rates_table, test_table
from measure import machine, publish

from finetune.arch import Arch
from finetune.model.checkpoint import Checkpoint
from finetune.model.hub import locate_base

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from constructed_base import write_constructed_base

LARGE_NAMES = {"20b": "openai/gpt-oss-20b", "120b": "openai/gpt-oss-120b"}

_LARGE_HIDDEN, _EXPERTS_OF_20B = 1024, 32


def main() -> None:
    arguments = parse()
    name = LARGE_NAMES.get(arguments.base, str(Path(arguments.base).resolve()))
    directory = locate_base(name, None).directory
    shape = Checkpoint.open(directory).arch
    setting = setting_for(shape)
    large = setting is not TINY
    work = arguments.work.resolve()
    facts = machine(torch.device("cuda" if large else "cpu")) | {"base": name, "base_sha256": digest_of(directory)}
    bases: dict[BaseName, tuple[str, str]] = {"given": (name, digest_of(directory))}
    if setting.constructed_base:
        constructed = work / "constructed"
        if not constructed.exists():
            write_constructed_base(constructed)
        bases["constructed"] = (str(constructed), digest_of(constructed))
    deadline = time.monotonic() + 60 * arguments.minutes
    runner = Runner(setting, bases, work, lambda: time.monotonic() < deadline)
    comparison = Comparison(setting, shape, runner, arguments.seeds, large)
    finished = comparison.run(arguments.tasks)
    missing = comparison.num_runs - len(finished)
    cut = f" {missing} of {comparison.num_runs} runs are not made yet." if missing else ""
    save, stem = bool(arguments.save), arguments.save or "compare"
    title = f"kinds of adapter on {directory.name}"
    rates = rates_table(comparison.trials, len(setting.learning_rates))
    publish(f"{stem}-rates", f"Learning rates of {title}", facts, rates, save=save, note=RATES_NOTE)
    rows = test_table(finished, comparison.bases, large)
    publish(stem, title[0].upper() + title[1:], facts, rows, save=save, note=TEST_NOTE + cut)
    failed = [row["variant"] for row in rows if row.get("control") == "FAILED"]
    if failed:
        raise SystemExit(f"a control that can learn nothing beats the most frequent answer: {failed}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="20b, 120b or a checkpoint's directory")
    parser.add_argument("--work", type=Path, required=True, help="directory of records and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=["legal", "medical", "creative"])
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no work after so many minutes")
    parser.add_argument("--save", metavar="NAME", help="write the tables to bench/results/DATE-NAME and -NAME-rates")
    return parser.parse_args()


def setting_for(shape: Arch) -> Setting:
    """Adapter settings for a base of this size."""
    if shape.hidden < _LARGE_HIDDEN:
        return TINY
    return LARGE_20B if shape.num_experts <= _EXPERTS_OF_20B else LARGE_120B


def digest_of(base: Path) -> str:
    """Digest that identifies a base: of the file that lists the shards' SHA-256, or of the index."""
    for name in ("checksums.json", "model.safetensors.index.json", "config.json"):
        if (base / name).is_file():
            return hashlib.sha256((base / name).read_bytes()).hexdigest()
    raise SystemExit(f"{base} is no checkpoint")


class Comparison:
    """Runs the plan.

    Attributes:
        trials: line, then learning rate: the result of training at that rate with the first seed.
        bases: task, base, "renamed" or "": the base's own scores.
        num_runs: runs of the second table when all is done.
    """

    def __init__(self, setting: Setting, shape: Arch, runner: Runner, seeds: list[int], large: bool) -> None:
        self.setting, self.runner, self.seeds, self.large = setting, runner, seeds, large
        self.tiers = plan(setting, shape)
        self.named = variants(setting, shape)
        self.trials: dict[Line, Trials] = {}
        self.bases: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.num_runs = 0

    def run(self, tasks: list[str] | None) -> list[Finished]:
        """Make as many runs as time allows, tier by tier; within a tier the seeds alternate."""
        finished = []
        for tier in self.tiers:
            lines = [line for line in tier if not tasks or line.task in tasks]
            self.num_runs += len(lines) * len(self.seeds)
            for seed in self.seeds:
                for line in lines:
                    rate = self.rate_of(self._chosen_with(line))
                    found = None if rate is None else self._finish(line, seed, rate)
                    if found:
                        finished.append(found)
                        self._score_base(found.run)
        return finished

    def rate_of(self, line: Line) -> float | None:
        """The learning rate with the least final validation loss; None: not all were tried yet."""
        tried = self.trials.setdefault(line, {})
        for rate in self.setting.learning_rates:
            if rate not in tried and (result := self.runner.trained(Run(line, self.seeds[0], rate))):
                tried[rate] = result
        if len(tried) < len(self.setting.learning_rates):
            return None
        return best_rate(tried)

    def _score_base(self, run: Run) -> None:
        """Score the base on the test examples, once per task, base and label names."""
        line = run.line
        key = (line.task, line.base, "renamed" if "renamed" in line.labels else "")
        if key not in self.bases and (scores := self.runner.base_scored(run)):
            self.bases[key] = scores

    def _chosen_with(self, line: Line) -> Line:
        """The line whose trials choose this one's rate: controls take that of the kind they control."""
        same = self.named.get(line.variant.same_adapter or "", line.variant)
        return Line(line.task, same)

    def _finish(self, line: Line, seed: int, rate: float) -> Finished | None:
        try:
            run = Run(line, seed, rate, self._steps(line, seed))
        except LookupError:
            return None
        result = self.runner.trained(run)
        scores = self.runner.scored(run) if result else None
        return Finished(run, result, scores) if result and scores else None

    def _steps(self, line: Line, seed: int) -> int | None:
        """Steps that fit into the training time of the variant that it is timed by; None: it has no such limit.

        Raises:
            LookupError: those runs do not exist yet.
        """
        if line.variant.timed_by is None:
            return None
        steps, seconds = [], []
        for name in (line.variant.timed_by, line.variant.same_adapter):
            other = Line(line.task, self.named[name or ""])
            rate = self.rate_of(other)
            result = None if rate is None else self.runner.trained(Run(other, seed, rate))
            if result is None:
                raise LookupError(name)
            steps.append(result["steps"])
            seconds.append(seconds_per_step(result, self.large))
        return round(steps[0] * seconds[0] / seconds[1])


def seconds_per_step(result: dict[str, Any], large: bool) -> float:
    """Processor seconds on a CPU, seconds on a GPU."""
    return float(result["clock"] / result["steps"] if large else result["processor_seconds_per_step"])


if __name__ == "__main__":
    main()
