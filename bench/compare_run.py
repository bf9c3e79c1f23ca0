"""One run of `bench/compare.py`: the real command in a child process, its processor time, and its test scores."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
from compare_plan import BaseName, Line, Run, Setting, Task
from compare_rows import Rows, write_rows

from finetune.config.schema import SourceConfig
from finetune.data.dataset import load_split
from finetune.evaluate.labels import score_labels
from finetune.evaluate.likelihood import held_out_loss
from finetune.evaluate.opening import open_model

COMMAND = [sys.executable, "-c", "from finetune.cli.main import entry; entry()"]
_POLL_SECONDS = 0.2
_MANY_EPOCHS = 1000
_LAST_STEPS = 20

Result = dict[str, Any]


def recipe(setting: Setting, base: str, rows: Rows, task: Task, work: Path) -> str:
    """A recipe's text: JSON, which is YAML too."""
    chunk = {} if setting.experts_per_chunk is None else {"experts_per_chunk": setting.experts_per_chunk}
    content = {
        "defaults": [{"override /model": setting.model}, {"override /data": "own"}],
        "model": {"path": base} | chunk,
        "data": {
            "train": {"rows": {"path": str(rows.train)}},
            "validation": {"rows": {"path": str(rows.validation)}},
            "max_length": setting.max_length,
            "reasoning_effort": "low",
            "cache_dir": str(work / "cache"),
        },
        "trainer": {
            "epochs": task.epochs,
            "gradient_accumulation_steps": setting.gradient_accumulation_steps,
            "activation_checkpointing": setting.activation_checkpointing,
        },
        "evaluate": {"routing_examples": 0, "every_steps": setting.validate_every},
        "export": {"read_back": "never"},
    }
    return "# @package _global_\n" + json.dumps(content, indent=1) + "\n"


class Runner:
    """Make runs, or find existing ones.

    Args:
        setting: settings shared by all runs.
        bases: directory or hub name of each base, and its digest.
        work: directory of records, runs and results; a run with the same settings is not repeated.
        may_go_on: called before each piece of work; once it returns False, only existing results are returned.
    """

    def __init__(
        self, setting: Setting, bases: dict[BaseName, tuple[str, str]], work: Path, may_go_on: Callable[[], bool]
    ) -> None:
        self._setting, self._bases, self._work, self._may_go_on = setting, bases, work, may_go_on
        self._rows: dict[tuple[str, str], Rows] = {}

    def rows(self, line: Line) -> Rows:
        """The line's records, written at the first call."""
        key = (line.task, line.labels)
        if key not in self._rows:
            self._rows[key] = write_rows(line.task, self._setting.tasks[line.task], self._work / "rows", line.labels)
        return self._rows[key]

    def trained(self, run: Run) -> Result | None:
        """Results of training: parameters, steps, times, the validation loss as [step, nats per token], and `balance`,
        the mean load-balancing loss of the last steps (1: every expert is used alike).

        Files of an interrupted attempt are removed first.

        Returns:
            None: it does not exist, and there is no time for it.
        """

        def make(directory: Path) -> Result:
            path = directory / "recipe.yaml"
            path.write_text(self._recipe(run.line), encoding="utf-8")
            clock = train([*COMMAND, "train", str(path), *self._words(run), f"output_dir={directory}", "name=run"])
            manifest = json.loads((directory / "run" / "manifest.json").read_text())
            return {
                "name": run.line.name,
                "command": " ".join(["finetune train recipe.yaml", *self._words(run)]),
                "parameters": sum(manifest["adapter_parameters"].values()),
                "steps": manifest["total_steps"],
                "clock": manifest["loop"]["seconds"],
                "validation": validation_losses(directory / "run" / "metrics.jsonl"),
                **clock,
            }

        directory = self.directory(run)
        if not (directory / "trained.json").is_file() and self._may_go_on():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        found = self._kept(directory / "trained.json", lambda: make(directory), f"{_title(run)}: training")
        metrics = directory / "run" / "metrics.jsonl"
        return found | {"balance": balance_at_end(metrics)} if found and metrics.is_file() else found

    def scored(self, run: Run) -> Result | None:
        """Scores of the test examples under a trained run's adapter."""
        directory = self.directory(run)
        return self._kept(
            directory / "scores.json",
            lambda: score(directory / "run", self.rows(run.line), whose="adapter"),
            f"{_title(run)}: test rows",
        )

    def base_scored(self, run: Run) -> Result | None:
        """Scores of the line's test examples under its base alone, with the help of a trained run."""
        rows = self.rows(run.line)
        digest = _digest(self._bases[run.line.base][1], rows.test.read_text())
        path = self._work / f"base-{run.line.task}-{digest}.json"
        directory = self.directory(run)
        return self._kept(path, lambda: score(directory / "run", rows, whose="base"), f"{run.line.name}: base")

    def directory(self, run: Run) -> Path:
        """Directory of a run with these settings."""
        text = self._recipe(run.line) + self.rows(run.line).digest + self._bases[run.line.base][1]
        return self._work / "runs" / _digest(text + " ".join(self._words(run)))

    def _kept(self, path: Path, make: Callable[[], Result], doing: str) -> Result | None:
        if not path.is_file():
            if not self._may_go_on():
                return None
            print(doing, file=sys.stderr, flush=True)
            content = json.dumps(make())
            staging = path.with_suffix(".partial")
            staging.write_text(content, encoding="utf-8")
            staging.replace(path)
        found: Result = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _recipe(self, line: Line) -> str:
        base = self._bases[line.base][0]
        return recipe(self._setting, base, self.rows(line), self._setting.tasks[line.task], self._work)

    def _words(self, run: Run) -> list[str]:
        limit = [] if run.steps is None else [f"trainer.max_steps={run.steps}", f"trainer.epochs={_MANY_EPOCHS}"]
        rate = f"trainer.learning_rate={run.learning_rate}"
        return [*run.line.variant.overrides(self._setting), rate, f"seed={run.seed}", *limit]


def train(command: list[str]) -> dict[str, float]:
    """Run the command; processor seconds of a step, taken from the first step seen to the last.

    Raises:
        SystemExit: it failed; its output is printed.
    """
    directory = Path(next(word for word in command if word.startswith("output_dir=")).partition("=")[2])
    metrics = directory / "run" / "metrics.jsonl"
    marks: list[tuple[int, float]] = []
    with (directory / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
        child, spent = psutil.Process(process.pid), 0.0
        while process.poll() is None:
            try:
                times = child.cpu_times()
            except psutil.Error:
                break
            spent = times.user + times.system
            steps = metrics.read_bytes().count(b'"kind": "step"') if metrics.is_file() else 0
            if steps and (not marks or steps > marks[-1][0]):
                marks.append((steps, spent))
            time.sleep(_POLL_SECONDS)
        if process.wait():
            sys.exit(f"{' '.join(command)} failed:\n{(directory / 'output.txt').read_text()}")
    (first, began), (last, ended) = marks[0], marks[-1]
    return {
        "processor_seconds": round(spent, 1),
        "processor_seconds_per_step": round((ended - began) / max(1, last - first), 4),
    }


def validation_losses(metrics: Path) -> list[tuple[int, float]]:
    """Step and validation loss of each evaluation of a run."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["validation_loss"]) for line in lines if line["kind"] == "evaluation"]


def balance_at_end(metrics: Path) -> float:
    """Mean load-balancing loss, before its coefficient, of the last `_LAST_STEPS` steps."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return mean([line["balance_loss"] for line in lines if line["kind"] == "step"][-_LAST_STEPS:])


def score(run: Path, rows: Rows, *, whose: str) -> Result:
    """Score the test examples.

    Returns:
        `nll` and `tokens` of each example's answer; for labelled examples also which label was `right` and which
        `chosen`, and the choice `centred`: each label's log-likelihood less its mean over the examples, which removes
        the model's preference for a label's name.
    """
    opened = open_model(run)
    data = replace(opened.data, test={"rows": SourceConfig(path=str(rows.test))})
    split = load_split(data, "test")
    with nullcontext() if whose == "adapter" else opened.adapter.disabled():
        if rows.labels is None:
            longest = max(data.max_length, *(len(sample.ids) for sample in split.examples))
            loss = held_out_loss(opened.base.model, split.examples, longest)
            return {"nll": loss.nll.tolist(), "tokens": loss.weight.tolist()}
        scores = score_labels(opened.base.model, split.records, rows.labels, data)
    nats = scores.log_likelihood
    return {
        "nll": (-nats[range(len(nats)), scores.right]).tolist(),
        "tokens": [1.0] * len(nats),
        "right": scores.right.tolist(),
        "chosen": nats.argmax(1).tolist(),
        "centred": (nats - nats.mean(0)).argmax(1).tolist(),
    }


def _title(run: Run) -> str:
    return f"{run.line.task}, {run.line.name}, learning rate {run.learning_rate:g}, seed {run.seed}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
