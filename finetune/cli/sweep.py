"""`finetune train RECIPE --sweep key=a,b`: a grid of runs, one after the other, and a table that compares them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import log
from finetune.errors import CheckError, ConfigError, Interrupted
from finetune.files import write_text

MOST_RUNS = 64


def sweep(recipe: str, overrides: Sequence[str], grid: Sequence[str]) -> Path:
    """Run every combination of the grid's values.

    All combinations are composed and checked before the first run starts. A run that fails is reported and
    counted; the others continue. Each is a process of its own, so that none inherits another's memory.

    Args:
        recipe: name or path.
        overrides: settings that all runs share.
        grid: one `key=a,b` per key; all combinations are run.

    Returns:
        The directory of the runs and of `sweep.md`.

    Raises:
        ConfigError: the grid cannot be read, is too large, or a combination is wrong.
        CheckError: every run failed.
        Interrupted: Ctrl-C; the runs so far are compared, and the interrupted one can be resumed.
    """
    from finetune.config.compose import compose

    combinations = [list(values) for values in itertools.product(*map(_values, grid))]
    if len(combinations) > MOST_RUNS:
        raise ConfigError(f"the grid has {len(combinations)} runs, more than {MOST_RUNS}", fix="vary fewer values")
    name = time.strftime("sweep-%Y%m%d-%H%M%S")
    composed = [compose(recipe, [*overrides, *settings]) for settings in combinations]
    config = composed[0].config
    if any(setting.partition("=")[0] == "name" for settings in combinations for setting in settings):
        raise ConfigError("--sweep name=... cannot be varied", fix="set name=... once: it names the sweep's directory")
    name = config.name or name
    directory = Path(config.output_dir) / name
    if config.name and directory.exists():
        raise ConfigError(f"{directory} exists already", why="no run is overwritten", fix="choose another name=...")
    overrides = [text for text in overrides if text.lstrip("+").partition("=")[0] != "name"]
    log.info(f"{len(combinations)} runs in {directory}")
    started, results = time.monotonic(), []
    for number, settings in enumerate(combinations, start=1):
        run = directory / f"{number:02}"
        log.info(
            f"--- run {number} of {len(combinations)}: {' '.join(settings)}{_time_left(started, number, combinations)}"
        )
        code = _run_one(recipe, [*overrides, *settings, f"output_dir={directory}", f"name='{run.name}'"])
        results.append((settings, run, code))
        if code:
            log.warning(f"run {number} ended with exit code {code}")
        if code in (130, 143):
            break
    table = comparison(results)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "sweep.md", f"# {name}: {recipe}\n\n{table}\n")
    log.result(table)
    if results[-1][2] in (130, 143):
        raise Interrupted(
            f"the sweep was stopped in run {len(results)}",
            signal_number=results[-1][2] - 128,
            fix=f"continue that run: finetune train --resume {results[-1][1]}",
        )
    if all(code for _, _, code in results):
        raise CheckError(f"all {len(results)} runs failed", fix=f"see their messages above; runs are in {directory}")
    return directory


def comparison(results: Sequence[tuple[Sequence[str], Path, int]]) -> str:
    """Write a Markdown table of runs: settings, figures after training and time; the best loss is marked.

    Args:
        results: settings, run directory and exit code of each run.
    """
    from finetune.report.read import RunFiles

    keys = [text.partition("=")[0] for text in results[0][0]]
    rows = []
    for settings, run, code in results:
        files = RunFiles.read(run)
        loss, accuracy = ((files.trained.final(t) if files.trained else None) for t in ("test loss", "accuracy"))
        best = files.manifest.get("loop", {}).get("best_loss")
        rows.append((settings, run, code, loss, accuracy, best, files.manifest.get("minutes")))
    losses = [loss if loss is not None else best for *_, loss, _, best, _ in rows]
    known = [loss for loss in losses if loss is not None]
    named = {"validation loss": 5, "test loss": 3, "accuracy": 4, "minutes": 6}
    shown = {title: place for title, place in named.items() if any(row[place] is not None for row in rows)}
    titles = ["run", *keys, *shown, ""]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row, judged in zip(rows, losses, strict=True):
        settings, run, code = row[:3]
        note = f"failed ({code})" if code else ("**best**" if known and judged == min(known) else "")
        values = [text.partition("=")[2] for text in settings]
        figures = [_figure(row[place], ".2f" if title == "minutes" else ".4f") for title, place in shown.items()]
        lines.append("| " + " | ".join([run.name, *values, *figures, note]) + " |")
    return "\n".join(lines)


def _time_left(started: float, number: int, combinations: Sequence[object]) -> str:
    if number == 1:
        return ""
    each = (time.monotonic() - started) / (number - 1)
    return f", about {log.duration(each * (len(combinations) - number + 1))} left"


def _values(text: str) -> list[str]:
    """Split `key=a,b` into `key=a` and `key=b`; commas inside brackets or quotes do not split."""
    key, equals, values = text.partition("=")
    if not equals or not key or not values:
        raise ConfigError(f"--sweep {text} cannot be read", fix="write --sweep key=a,b")
    parts, depth, quote = [""], 0, ""
    for character in values:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if not all(parts):
        raise ConfigError(f"--sweep {text} has an empty value", fix="write --sweep key=a,b")
    return [f"{key}={part}" for part in parts]


def _run_one(recipe: str, overrides: Sequence[str]) -> int:
    """Run in a separate process and wait for its end; Ctrl-C reaches it too."""
    command = [sys.executable, "-c", "from finetune.cli.main import entry; entry()", "train", recipe, *overrides]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def _figure(value: Any, form: str = ".4f") -> str:
    return "" if value is None else json.dumps(value) if not isinstance(value, float) else f"{value:{form}}"
