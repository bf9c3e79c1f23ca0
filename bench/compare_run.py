"""One run of `bench/compare.py`: the real command in a child process, its processor time, and its test rows scored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from compare_plan import Planned, Setting
from compare_rows import Rows

from finetune.config.schema import SourceConfig
from finetune.data.dataset import load_split
from finetune.evaluate.labels import score_labels
from finetune.evaluate.likelihood import held_out_loss
from finetune.evaluate.opening import open_model

COMMAND = [sys.executable, "-c", "from finetune.cli.main import entry; entry()"]
_POLL_SECONDS = 0.2
_MANY_EPOCHS = 1000


def recipe(setting: Setting, base: str, rows: Rows, epochs: int, work: Path) -> str:
    """A recipe's text: JSON, which is YAML too."""
    content = {
        "defaults": [{"override /model": setting.model}, {"override /data": "own"}],
        "model": {"path": base},
        "data": {
            "train": {"rows": {"path": str(rows.train)}},
            "max_length": setting.max_length,
            "reasoning_effort": "low",
            "cache_dir": str(work / "cache"),
        },
        "trainer": {
            "epochs": epochs,
            "micro_steps": setting.micro_steps,
            "learning_rate": setting.learning_rate,
            "activation_checkpointing": setting.activation_checkpointing,
        },
        "evaluate": {"routing_samples": 0},
        "export": {"read_back": "never"},
    }
    return "# @package _global_\n" + json.dumps(content, indent=1) + "\n"


class Runner:
    """Makes runs, or finds them made.

    Args:
        setting: what all runs have in common.
        base: directory or hub name.
        base_digest: tells bases apart.
        work: rows, runs and results lie below; a run whose settings are the same is not made again.
    """

    def __init__(self, setting: Setting, base: str, base_digest: str, work: Path) -> None:
        self._setting, self._base, self._digest, self._work = setting, base, base_digest, work

    def find(self, planned: Planned, rows: Rows, steps: int | None) -> dict[str, Any] | None:
        """A finished run's result."""
        path = self._directory(planned, rows, steps) / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def make(self, planned: Planned, rows: Rows, steps: int | None) -> dict[str, Any]:
        """Train and score; what an interrupted attempt left is removed first.

        Args:
            steps: optimiser steps; None: the task's epochs.
        """
        directory = self._directory(planned, rows, steps)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        path = directory / "recipe.yaml"
        path.write_text(self._recipe(planned, rows), encoding="utf-8")
        words = [*self._words(planned, steps), f"output_dir={directory}", "name=run"]
        clock = train([*COMMAND, "train", str(path), *words], directory)
        manifest = json.loads((directory / "run" / "manifest.json").read_text())
        result = {
            "name": planned.name,
            "seed": planned.seed,
            "command": " ".join(["finetune train recipe.yaml", *self._words(planned, steps)]),
            "parameters": sum(manifest["adapter_parameters"].values()),
            "steps": manifest["total_steps"],
            "clock": manifest["loop"]["seconds"],
            **clock,
            "scores": score(directory / "run", rows, whose="adapter"),
        }
        staging = directory / "result.partial"
        staging.write_text(json.dumps(result), encoding="utf-8")
        staging.replace(directory / "result.json")
        return result

    def base_scores(self, planned: Planned, rows: Rows) -> dict[str, Any]:
        """The base's scores on a task's test rows, found or made with the help of a finished run on them."""
        path = self._work / f"base-{planned.task}-{_digest(self._digest, rows.test.read_text())}.json"
        if not path.is_file():
            scores = score(self._directory(planned, rows, None) / "run", rows, whose="base")
            path.write_text(json.dumps(scores), encoding="utf-8")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _recipe(self, planned: Planned, rows: Rows) -> str:
        return recipe(self._setting, self._base, rows, self._setting.tasks[planned.task].epochs, self._work)

    def _words(self, planned: Planned, steps: int | None) -> list[str]:
        limit = [] if steps is None else [f"trainer.max_steps={steps}", f"trainer.epochs={_MANY_EPOCHS}"]
        return [*planned.variant.overrides(self._setting), f"seed={planned.seed}", *limit]

    def _directory(self, planned: Planned, rows: Rows, steps: int | None) -> Path:
        text = self._recipe(planned, rows) + rows.digest + self._digest + " ".join(self._words(planned, steps))
        return self._work / "runs" / _digest(text)


def train(command: list[str], directory: Path) -> dict[str, float]:
    """Run the command; processor seconds of a step, taken from the first step seen to the last.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
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


def score(run: Path, rows: Rows, *, whose: str) -> dict[str, Any]:
    """Score the test rows.

    Returns:
        `nll` and `tokens` of each row's answer; for labelled rows also which label was right and which chosen.
    """
    opened = open_model(run)
    data = replace(opened.data, test={"rows": SourceConfig(path=str(rows.test))})
    split = load_split(data, "test")
    with nullcontext() if whose == "adapter" else opened.adapter.disabled():
        if rows.labels is None:
            longest = max(data.max_length, *(len(sample.ids) for sample in split.samples))
            loss = held_out_loss(opened.base.model, split.samples, longest)
            return {"nll": loss.nll.tolist(), "tokens": loss.weight.tolist()}
        scores = score_labels(opened.base.model, split.records, rows.labels, data)
    own = scores.log_likelihood[range(len(scores.right)), scores.right]
    return {
        "nll": (-own).tolist(),
        "tokens": [1.0] * len(own),
        "right": scores.right.tolist(),
        "chosen": scores.log_likelihood.argmax(1).tolist(),
    }


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
