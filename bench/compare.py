"""Compare kinds of adapter on one base: attention, experts, ranks, routers, at equal parameters and at equal time.

    python bench/compare.py --base DIRECTORY --work DIRECTORY [--minutes N] [--save NAME]
    python bench/compare.py --base 20b --work DIRECTORY --save compare-20b      (a GPU; hours)

Every run is `finetune train` in a child process; the same test rows are scored by likelihood under every adapter. Runs
are kept below --work by their settings: the program goes on where it was stopped, and --minutes starts no run later.
Differences are paired by seed. The control trains on shuffled labels and must not beat the most frequent answer.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from compare_plan import LARGE, TINY, Planned, plan
from compare_rows import Rows, write_rows
from compare_run import Runner
from measure import machine, publish

from finetune.evaluate.intervals import wilson_interval
from finetune.model.checkpoint import Checkpoint
from finetune.model.hub import locate_base

LARGE_NAMES = {"20b": "openai/gpt-oss-20b"}
NOTE = (
    "Loss: nats of a row's answer (label tasks) or of a token (creative), mean over test rows. `difference` is to the "
    "first row of the task in the loss, paired by seed: mean, least and most. Alpha is the same for every rank, and so "
    "is the learning rate where the variant does not name another; neither was tuned for each variant."
)
Results = dict[tuple[str, int], dict[str, Any]]


def main() -> None:
    arguments = parse()
    large = arguments.base in LARGE_NAMES
    setting = LARGE if large else TINY
    name = LARGE_NAMES.get(arguments.base, str(Path(arguments.base).resolve()))
    directory = locate_base(name, None).directory
    shape = Checkpoint.open(directory).shape
    work = arguments.work.resolve()
    facts = machine(torch.device("cuda" if large else "cpu")) | {"base": name, "base_sha256": digest_of(directory)}
    runner = Runner(setting, name, digest_of(directory), work)
    todo = plan(setting, shape, arguments.seeds)
    if arguments.tasks:
        todo = [planned for planned in todo if planned.task in arguments.tasks]
    results: Results = {}
    rows_of: dict[tuple[str, bool], Rows] = {}
    deadline = time.monotonic() + 60 * arguments.minutes
    for number, planned in enumerate(todo, 1):
        rows = rows_of.setdefault(
            (planned.task, planned.shuffled),
            write_rows(planned.task, setting.tasks[planned.task], work / "rows", shuffled=planned.shuffled),
        )
        try:
            steps = steps_of_equal_time(planned, results, large)
        except LookupError:
            continue
        result = runner.find(planned, rows, steps)
        if result is None and time.monotonic() < deadline:
            print(f"[{number}/{len(todo)}] {planned.name}, seed {planned.seed}", file=sys.stderr, flush=True)
            result = runner.make(planned, rows, steps)
            show(result)
        if result is not None:
            results[planned.name, planned.seed] = result
    table = [row for task in setting.tasks for row in table_of(task, todo, results, rows_of, runner, large)]
    missing = [planned for planned in todo if (planned.name, planned.seed) not in results]
    note = NOTE + (f" {len(missing)} of {len(todo)} runs are not made yet." if missing else "")
    publish(
        arguments.save or "compare",
        f"Kinds of adapter on {directory.name}",
        facts,
        table,
        save=bool(arguments.save),
        note=note,
    )
    failed = [row["variant"] for row in table if row.get("control") == "FAILED"]
    if failed:
        sys.exit(f"the shuffled-label control beats the most frequent answer: {failed}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="directory of a tiny base, or 20b")
    parser.add_argument("--work", type=Path, required=True, help="where rows and runs lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=["legal", "medical", "creative"])
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    parser.add_argument("--save", metavar="NAME", help="write the table to bench/results/DATE-NAME")
    return parser.parse_args()


def digest_of(base: Path) -> str:
    """Tells bases apart: of the file that lists the shards' sha256, or of the index."""
    for name in ("checksums.json", "model.safetensors.index.json", "config.json"):
        if (base / name).is_file():
            return hashlib.sha256((base / name).read_bytes()).hexdigest()
    raise SystemExit(f"{base} is no checkpoint")


def seconds_per_step(result: dict[str, Any], large: bool) -> float:
    """Processor seconds on a CPU, seconds on a GPU."""
    return result["clock"] / result["steps"] if large else result["processor_seconds_per_step"]


def steps_of_equal_time(planned: Planned, results: Results, large: bool) -> int | None:
    """Steps that fit into the training time of the variant that it is timed by; None: it has no such limit.

    Raises:
        LookupError: those runs are not made yet.
    """
    if planned.variant.timed_by is None:
        return None
    reference = results[f"{planned.task}, {planned.variant.timed_by}", planned.seed]
    same = results[f"{planned.task}, {planned.variant.same_adapter}", planned.seed]
    return round(reference["steps"] * seconds_per_step(reference, large) / seconds_per_step(same, large))


def show(result: dict[str, Any]) -> None:
    scores = result["scores"]
    text = f"    loss {loss_of(scores):.3f}"
    if "right" in scores:
        text += f", accuracy {accuracy_of(scores):.3f}"
    print(f"{text}, {result['processor_seconds']:.0f} processor seconds", file=sys.stderr, flush=True)


def loss_of(scores: dict[str, Any]) -> float:
    return sum(scores["nll"]) / sum(scores["tokens"])


def accuracy_of(scores: dict[str, Any]) -> float:
    return float(np.mean(np.array(scores["right"]) == np.array(scores["chosen"])))


def table_of(
    task: str,
    todo: list[Planned],
    results: Results,
    rows_of: dict[tuple[str, bool], Rows],
    runner: Runner,
    large: bool,
) -> Iterator[dict[str, Any]]:
    """Lines of one task: the base, the most frequent answer, then every variant that has runs."""
    done = [planned for planned in todo if planned.task == task and (planned.name, planned.seed) in results]
    plain = [planned for planned in done if not planned.shuffled and planned.variant.timed_by is None]
    if not plain:
        return
    base = runner.base_scores(plain[0], rows_of[plain[0].task, False])
    yield {"task": task, "variant": "base"} | figures([base])
    if "right" in base:
        constant = float(np.bincount(base["right"]).max() / len(base["right"]))
        yield {"task": task, "variant": "most frequent answer", "accuracy": round(constant, 3)}
    names = list(dict.fromkeys(planned.name for planned in done))
    reference = {seed: result for (name, seed), result in results.items() if name == plain[0].name}
    for name in names:
        runs = {seed: result for (other, seed), result in results.items() if other == name}
        first = next(iter(runs.values()))
        line: dict[str, Any] = {
            "task": task,
            "variant": name.removeprefix(f"{task}, "),
            "seeds": len(runs),
            "parameters": first["parameters"],
            "steps": first["steps"],
            "ms a step": round(1e3 * mean(seconds_per_step(run, large) for run in runs.values())),
        }
        line |= figures([run["scores"] for run in runs.values()])
        line |= differences(runs, reference) if name != plain[0].name else {}
        if "shuffled" in name:
            line["control"] = "FAILED" if any(beats_constant(run["scores"]) for run in runs.values()) else "passed"
        yield line


def figures(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss and accuracy: mean, and each seed's."""
    losses = [loss_of(each) for each in scores]
    line: dict[str, Any] = {"loss": round(mean(losses), 3), "loss by seed": by_seed(losses)}
    if "right" in scores[0]:
        accuracies = [accuracy_of(each) for each in scores]
        line |= {"accuracy": round(mean(accuracies), 3), "accuracy by seed": by_seed(accuracies)}
    else:
        line["perplexity"] = round(math.exp(mean(losses)), 1)
    return line


def by_seed(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def differences(runs: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Loss less the reference's with the same seed: mean [least, most]."""
    found = [
        loss_of(run["scores"]) - loss_of(reference[seed]["scores"]) for seed, run in runs.items() if seed in reference
    ]
    return {"difference": f"{mean(found):+.3f} [{min(found):+.3f}, {max(found):+.3f}]"} if found else {}


def beats_constant(scores: dict[str, Any]) -> bool:
    """Whether accuracy lies above the most frequent answer's by more than chance (99 %, two-sided)."""
    right = np.array(scores["right"])
    num_right = int((right == np.array(scores["chosen"])).sum())
    return wilson_interval(num_right, len(right), 0.99)[0] > np.bincount(right).max() / len(right)


if __name__ == "__main__":
    main()
