"""Cost of checkpoints and of a start, and a check that thousands of steps leak no memory or file handles.

`python bench/save_cost.py saves|start|soak`. Seconds are of processor time, all threads together, so that other work on
the machine does not count; beside them the wall time that the training loop itself waited in a save.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from finetune import log
from finetune.cli.main import main
from finetune.model import tiny
from finetune.train import trainer

RECIPE = """# @package _global_
defaults:
  - override /model: tiny
  - override /data: own
model: {path: %(base)s}
data:
  train: {mine: {path: %(rows)s}}
  max_length: %(length)d
trainer: {epochs: 100000, gradient_accumulation_steps: 1, schedule: constant}
export: {read_back: never}
"""
SAVE_EVERY = 100


def write_inputs(directory: Path, length: int) -> Path:
    """A tiny base, short records and a recipe; the recipe's path."""
    tiny.write_tiny_base(directory / "base", seed=0, kind="random")
    rows = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(200)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"base": directory / "base", "rows": directory / "rows.jsonl", "length": length}
    (directory / "recipe.yaml").write_text(RECIPE % values)
    return directory / "recipe.yaml"


class Clock:
    """Processor and wall seconds of each call of a method, of the class as it is now."""

    def __init__(self, owner: type, name: str) -> None:
        self.processor: list[float] = []
        self.wall: list[float] = []
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, processor = time.monotonic(), time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.wall.append(time.monotonic() - wall)
                self.processor.append(time.process_time() - processor)

        setattr(owner, name, timed)


def saves(directory: Path, steps: int, length: int) -> dict[str, Any]:
    """Cost of a save in the background and in the foreground as a share of `SAVE_EVERY` steps."""
    recipe = write_inputs(directory, length)
    step = Clock(trainer.OptimiserStep, "__call__")
    save = Clock(trainer.CheckpointWriter, "save")
    figures: dict[str, Any] = {"steps": steps, "row_tokens": length}
    for background in (True, False):
        for clock in (step, save):
            clock.processor.clear(), clock.wall.clear()
        name = "background" if background else "foreground"
        overrides = [f"trainer.max_steps={steps}", "save.every_steps=5", f"save.background={str(background).lower()}"]
        assert main(["train", str(recipe), f"output_dir={directory}", f"name={name}", *overrides]) == 0
        one_step = median(step.processor)
        figures[name] = {
            "step_processor_s": round(one_step, 4),
            "step_wall_s": round(median(step.wall), 4),
            "save_waited_wall_s": round(median(save.wall), 4),
            "save_waited_processor_s": round(median(save.processor), 4),
        }
    whole = median(save.processor)  # the last runs' saves wait for all of the work, so that this is all of it
    figures["save_share_of_100_steps"] = round(whole / (SAVE_EVERY * figures["foreground"]["step_processor_s"]), 5)
    return figures


def start(directory: Path, length: int) -> dict[str, Any]:
    """Processor seconds of the command up to and with its first step, imports included, the read-back not."""
    recipe = write_inputs(directory, length)
    found = []
    for number in range(2):  # the first makes the token cache
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        code = "from finetune.cli.main import entry; entry()"
        arguments = ["train", str(recipe), f"output_dir={directory}", f"name=start-{number}", "trainer.max_steps=1"]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append({"processor_s": round(processor, 1), "wall_s": round(time.monotonic() - started, 1)})
    return {"first": found[0], "tokens_cached": found[1]}


def soak(directory: Path, steps: int, length: int) -> dict[str, Any]:
    """Resident memory and open files after each tenth of a run that saves every 20 steps; the last are to be flat."""
    recipe = write_inputs(directory, length)
    seen: list[tuple[int, float, int]] = []
    count = trainer.Trainer._record

    def count_and_look(self: trainer.Trainer, *args: Any) -> None:
        count(self, *args)
        if self.state.step % max(1, steps // 10) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((self.state.step, pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))))
            log.info(f"step {seen[-1][0]}: {seen[-1][1]:.1f} MiB, {seen[-1][2]} open files")

    setattr(trainer.Trainer, "_record", count_and_look)  # noqa: B010
    overrides = [f"trainer.max_steps={steps}", "save.every_steps=20"]
    assert main(["train", str(recipe), f"output_dir={directory}", "name=soak", *overrides]) == 0
    third = len(seen) // 3
    return {
        "steps": steps,
        "row_tokens": length,
        "step_memory_mib_open_files": [(step, round(memory, 1), files) for step, memory, files in seen],
        "growth_mib_over_last_two_thirds": round(seen[-1][1] - seen[third][1], 1),
        "growth_of_open_files": seen[-1][2] - seen[third][2],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["saves", "start", "soak"])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--length", type=int, default=128, help="tokens per packed sequence")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cost-") as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
        if args.what == "start":
            result = start(Path(place), args.length)
        else:
            result = {"saves": saves, "soak": soak}[args.what](Path(place), args.steps, args.length)
    log.result(json.dumps({"what": args.what, "date": time.strftime("%Y-%m-%d"), **result}))
