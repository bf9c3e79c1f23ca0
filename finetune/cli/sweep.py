"""`finetune train RECIPE --sweep key=a,b`: a grid of runs, one after the other, and a table that compares them."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune import log
from finetune.config.differences import differences
from finetune.config.validate import to_plain
from finetune.errors import CheckError, ConfigError, Interrupted, MachineError
from finetune.files import only_writer, read_json, write_json, write_text
from finetune.records import read_record
from finetune.train.run_directory import Run

MOST_RUNS = 64
PLAN = "sweep.json"
"""File of a sweep's directory that says which runs it consists of."""

Outcome = tuple[Sequence[str], Path, int | None]
"""Settings, run directory and exit code of a run; None: it has not ended."""


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep, as its directory records them.

    Attributes:
        recipe: name or path.
        overrides: settings that all runs share, without their name.
        grid: one `key=a,b` per key.
        started_in: the working directory, from which relative paths are meant.
        configs: of each run, as composed when the sweep began.
    """

    recipe: str
    overrides: list[str]
    grid: list[str]
    started_in: str
    configs: list[dict[str, Any]]

    @property
    def combinations(self) -> list[list[str]]:
        """The settings of each run."""
        return _combinations(self.grid)


def sweep(recipe: str, overrides: Sequence[str], grid: Sequence[str]) -> Path:
    """Run every combination of the grid's values.

    All combinations are composed and checked before the first run starts. A run that fails is reported and
    counted; the others continue. Each is a process of its own, so that none inherits another's memory.

    Args:
        recipe: name or path.
        overrides: settings that all runs share.
        grid: one `key=a,b` per key; all combinations are run.

    Returns:
        The directory of the runs, of `sweep.json` and of `sweep.md`.

    Raises:
        ConfigError: the grid cannot be read, is too large, or a combination is wrong.
        CheckError: every run failed.
        Interrupted: Ctrl-C; the runs so far are compared, and the sweep can be continued.
        MachineError: its directory cannot be made.
    """
    combinations = _combinations(grid)
    if len(combinations) > MOST_RUNS:
        raise ConfigError(f"the grid has {len(combinations)} runs, more than {MOST_RUNS}", fix="vary fewer values")
    name = time.strftime("sweep-%Y%m%d-%H%M%S")
    configs = _composed(recipe, overrides, combinations)
    if any(setting.partition("=")[0] == "name" for settings in combinations for setting in settings):
        raise ConfigError("--sweep name=... cannot be varied", fix="set name=... once: it names the sweep's directory")
    given = configs[0]["name"]
    directory = Path(configs[0]["output_dir"]) / (given or name)
    if given and directory.exists():
        begun = (directory / PLAN).is_file()
        fix = f"continue it: finetune train --resume {directory}; or choose another name=..."
        raise ConfigError(
            f"{directory} exists already", why="no run is overwritten", fix=fix if begun else "choose another name=..."
        )
    overrides = [text for text in overrides if text.lstrip("+").partition("=")[0] != "name"]
    plan = Plan(recipe, overrides, list(grid), str(Path.cwd()), configs)
    with only_writer(directory):
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            fix = "set output_dir to a place you may write to"
            raise MachineError(f"cannot make {directory}: {error.strerror}", fix=fix) from error
        write_json(directory / PLAN, asdict(plan))
        log.info(f"{len(combinations)} runs in {directory}")
        _carry_out(plan, directory)
    return directory


def resume_sweep(directory: Path) -> None:
    """Go on with a sweep that was stopped or killed: finished runs are kept, begun ones resumed, the others made.

    Raises:
        ConfigError: its recipe was changed, it is called from another directory, or it is still going on.
        InputError: sweep.json cannot be read.
        CheckError, Interrupted: as `sweep`.
    """
    directory = directory.absolute()
    plan = read_record(Plan, directory / PLAN, "the plan of a sweep")
    if Path.cwd() != Path(plan.started_in):
        raise ConfigError(
            f"the sweep {directory} was started in another directory",
            why="paths in its recipe and settings may be relative to that",
            fix=f"cd {shlex.quote(plan.started_in)} first",
        )
    composed = _composed(plan.recipe, plan.overrides, plan.combinations)
    for before, after in zip(plan.configs, composed, strict=True):
        changed = [one.describe() for one in differences(before, after) if one.key != "name"]
        if changed:
            raise ConfigError(
                f"the recipe {plan.recipe} has changed since the sweep began: {'; '.join(changed)}",
                why="its remaining runs would not be comparable with the finished ones",
                fix="undo the change, or start a new sweep",
            )
    with only_writer(directory):
        runs = [directory / f"{number:02}" for number in range(1, len(plan.combinations) + 1)]
        finished, begun = sum(map(_is_finished, runs)), sum(map(_is_begun, runs))
        left = len(runs) - finished - begun
        log.info(f"{directory}: {finished} of {len(runs)} runs are finished, {begun} are resumed, {left} are made")
        _carry_out(plan, directory)


def _carry_out(plan: Plan, directory: Path) -> None:
    """Make or resume every run that is not finished; sweep.md is written anew after each."""
    count, started, made = len(plan.combinations), time.monotonic(), 0
    results: list[Outcome] = []
    for number, given in enumerate(plan.combinations, start=1):
        run = directory / f"{number:02}"
        results.append((given, run, 0 if _is_finished(run) else None))
    _write_table(plan, directory, results)
    stopped = None
    for index, (settings, run, code) in enumerate(results):
        if code == 0:
            continue
        left = _time_left(started, made, sum(code is None for *_, code in results))
        log.info(f"--- run {index + 1} of {count}: {' '.join(settings)}{left}")
        code, made = _run_one(_words(plan, settings, run)), made + 1
        results[index] = (settings, run, code)
        _write_table(plan, directory, results)
        if code:
            log.warning(f"run {index + 1} ended with exit code {code}")
        if code in (130, 143):
            stopped = index
            break
    log.result(comparison(results))
    if stopped is not None:
        raise Interrupted(
            f"the sweep was stopped in run {stopped + 1} of {count}",
            signal_number=(results[stopped][2] or 0) - 128,
            fix=f"continue the sweep: finetune train --resume {directory}; that run alone: {results[stopped][1]}",
        )
    if all(code for *_, code in results):
        raise CheckError(f"all {count} runs failed", fix=f"see their messages above; runs are in {directory}")


def _words(plan: Plan, settings: Sequence[str], run: Path) -> list[str]:
    """What follows `finetune train` to make a run, or to go on with it.

    Raises:
        ConfigError: another process is at work on it.
    """
    if run.exists():
        if (run / "config.yaml").is_file():
            with Run.open(run).locked():  # a run may live on after its sweep was killed
                pass
        if _is_begun(run):
            return ["--resume", str(run)]
        log.warning(f"{run} was killed before its first checkpoint: it starts again")
        shutil.rmtree(run)
    return [plan.recipe, *plan.overrides, *settings, f"output_dir={run.parent}", f"name='{run.name}'"]


def _is_finished(run: Path) -> bool:
    manifest = run / "manifest.json"
    return manifest.is_file() and read_json(manifest, "a run's manifest").get("status") == "finished"


def _is_begun(run: Path) -> bool:
    """Whether a run that is not finished has something to resume from."""
    return not _is_finished(run) and any(run.glob("checkpoints/step-*[0-9]"))


def _combinations(grid: Sequence[str]) -> list[list[str]]:
    return [list(values) for values in itertools.product(*map(_values, grid))]


def _composed(recipe: str, overrides: Sequence[str], combinations: list[list[str]]) -> list[dict[str, Any]]:
    """The configuration of every run as plain values."""
    from finetune.config.compose import compose

    configs = [compose(recipe, [*overrides, *settings]).config for settings in combinations]
    return [json.loads(json.dumps(to_plain(config))) for config in configs]


def _write_table(plan: Plan, directory: Path, results: Sequence[Outcome]) -> None:
    write_text(directory / "sweep.md", f"# {directory.name}: {plan.recipe}\n\n{comparison(results)}\n")


def comparison(results: Sequence[Outcome]) -> str:
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
    known = [loss for row, loss in zip(rows, losses, strict=True) if loss is not None and row[2] == 0]
    named = {"validation loss": 5, "test loss": 3, "accuracy": 4, "minutes": 6}
    shown = {title: place for title, place in named.items() if any(row[place] is not None for row in rows)}
    titles = ["run", *keys, *shown, ""]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row, judged in zip(rows, losses, strict=True):
        settings, run, code = row[:3]
        best_of_all = "**best**" if known and judged == min(known) else ""
        note = "not finished" if code is None else f"failed ({code})" if code else best_of_all
        values = [text.partition("=")[2] for text in settings]
        figures = [_figure(row[place], ".2f" if title == "minutes" else ".4f") for title, place in shown.items()]
        lines.append("| " + " | ".join([run.name, *values, *figures, note]) + " |")
    return "\n".join(lines)


def _time_left(started: float, made: int, left: int) -> str:
    if not made:
        return ""
    return f", about {log.duration((time.monotonic() - started) / made * left)} left"


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


def _run_one(words: Sequence[str]) -> int:
    """Run in a separate process and wait for its end; Ctrl-C reaches it too."""
    command = [sys.executable, "-c", "from finetune.cli.main import entry; entry()", "train", *words]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def _figure(value: Any, form: str = ".4f") -> str:
    return "" if value is None else json.dumps(value) if not isinstance(value, float) else f"{value:{form}}"
