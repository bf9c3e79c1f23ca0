"""Interrupt small runs with every known fault, resume them, and compare with an undisturbed run.

`python bench/faults.py --kills 50 --out bench/results/DATE-faults.md`. For each fault the table lists the guarantee,
the outcome, and the number of steps lost. "The same" means: metrics, adapter, optimiser, loop state, evaluation and
exported adapter equal the undisturbed run's to the last bit. Needs Linux; mounts small file systems where it may (as
root) and reports where it may not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fault_hooks import (
    DAMAGES,
    STEPS,
    Hook,
    Place,
    between_file_operations,
    full_disk,
    mounted,
    nothing,
    poison_after,
    remounted_read_only,
    signal_in,
    small_disk_bytes,
    tracker_down_after,
)
from fault_writers import rows as writer_rows
from small_run import RECIPE, assert_same_run

from finetune import __version__, log
from finetune.cli.main import main
from finetune.model.tiny import write_tiny_base
from finetune.train.checkpoint import LATEST, fault_in, list_checkpoints

EVERY = 2  # steps between two saves
OVERRIDES = (
    f"trainer.max_steps={STEPS}",
    "trainer.gradient_accumulation_steps=1",
    f"save.every_steps={EVERY}",
    f"evaluate.every_steps={EVERY}",
    "evaluate.validation_examples=2",
    "evaluate.test_examples=2",
    "evaluate.labels=never",
)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    fault: str
    promised: str
    happened: str
    lost: int | None
    kept: bool


class Bench:
    """Runs and resumes in child processes that share this one's imports."""

    def __init__(self, place: Path) -> None:
        self.place, self.rows = place, list[Row]()
        write_tiny_base(place / "base", seed=0, kind="random")
        write_sums(place / "work", place / "base")
        self.undisturbed = place / "undisturbed"
        code, _ = self.run(self.undisturbed)
        assert code == 0, (place / "said.txt").read_text()

    def start(self, arguments: list[str], hook: Hook) -> int:
        """Fork a process that carries out the command; its number."""
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            with (self.place / "said.txt").open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            hook()
            os._exit(main(arguments))
        return child

    def wait(self, child: int) -> int:
        """Wait for its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def arguments(self, run: Path, *overrides: str) -> list[str]:
        """The command that starts a run."""
        recipe = str(self.place / "work" / "small.yaml")
        return ["train", recipe, f"output_dir={run.parent}", f"name={run.name}", *OVERRIDES, *overrides]

    def run(self, run: Path, hook: Hook = nothing, *overrides: str) -> tuple[int, float]:
        """Start a run and wait for it: exit code and seconds."""
        started = time.monotonic()
        return self.wait(self.start(self.arguments(run, *overrides), hook)), time.monotonic() - started

    def resume(self, run: Path, hook: Hook = nothing) -> int:
        """Resume and wait: exit code."""
        return self.wait(self.start(["train", "--resume", str(run)], hook))

    def said(self) -> str:
        """Output of the last process."""
        return (self.place / "said.txt").read_text()

    def judge(self, fault: str, promised: str, run: Path, code: int, codes: tuple[int, ...]) -> None:
        """Resume after a fault and add a line to the table."""
        made = steps_made(run)
        whole = [step for step, path in list_checkpoints(run / "checkpoints") if fault_in(path) is None]
        message = last_line(self.said())
        if whole or code == 0:
            lost = made - whole[-1] if whole else 0
            again = self.resume(run) if code != 0 else 0
            same = again == 0 and same_as(self.undisturbed, run)
            happened = f"{code_text(code)}; resumed after step {whole[-1] if whole else 0}, "
            happened += "the same" if same else f"NOT the same (exit {again})"
        else:  # nothing to lose yet: the run is started again
            lost, same = made, True
            happened = f"{code_text(code)}, before the first checkpoint ({made} steps made): nothing to resume"
        if code > 0:
            happened += f" ({message[:90]})"
        kept = same and code in codes and "Traceback" not in message and lost < 2 * EVERY
        self.rows.append(Row(fault, promised, happened, lost, kept))


def write_sums(directory: Path, base: Path) -> None:
    """The tests' small recipe over records of about a hundred tokens; their content does not matter."""
    directory.mkdir()
    for split, numbers in {"train": range(0, 40), "validation": range(40, 44), "test": range(44, 48)}.items():
        rows = [
            {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
            for n in numbers
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE % {"base": base, "rows": directory}
    (directory / "small.yaml").write_text(recipe.replace("max_length: 700", "max_length: 128"))


def steps_made(run: Path) -> int:
    """Steps that metrics.jsonl names."""
    if not (run / "metrics.jsonl").exists():
        return 0
    text = (run / "metrics.jsonl").read_text()  # its last line may be half there
    return max((json.loads(line)["step"] for line in text.split("\n")[:-1] if '"step", ' in line), default=0)


def wait_for_step(run: Path, step: int) -> None:
    """Wait until a run has made a step; 0: until its directory exists."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run.exists() and not step) or steps_made(run) >= step > 0:
            return
        time.sleep(0.01)


def same_as(one: Path, other: Path) -> bool:
    """Whether everything that training determines is bit-identical."""
    try:
        assert_same_run(one, other)
    except AssertionError:
        return False
    return True


def code_text(code: int) -> str:
    """An exit code, or the signal that ended the process."""
    return f"exit {code}" if code >= 0 else f"killed by signal {-code}"


def last_line(said: str) -> str:
    """The line with the error, or the last one."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].replace("|", "/")


def kills(bench: Bench, count: int, moments: random.Random) -> Iterator[str]:
    """kill -9, half of them at a random time after a random step, half at a random file operation inside a save."""
    seconds = bench.run(bench.place / "timed")[1]
    for number in range(count):
        run = bench.place / f"kill-{number}"
        if number % 2:
            name, operation = "kill -9 inside a save", moments.randrange(40)
            code = bench.run(run, between_file_operations(operation))[0]
            name += f", file operation {operation}"
        else:
            step, share = moments.randrange(STEPS), moments.random()
            child = bench.start(bench.arguments(run), nothing)
            wait_for_step(run, step)
            time.sleep(share * seconds / STEPS)  # a step and its save or validation take less
            os.kill(child, 9)  # not reaped yet, so the number is still its own
            code = bench.wait(child)
            name = f"kill -9 up to {share * seconds / STEPS:.1f} s after step {step}"
        bench.judge(name, "older checkpoints stay whole", run, code, (-9, 0))
        shutil.rmtree(run, ignore_errors=True)
        yield name


def signals(bench: Bench) -> Iterator[str]:
    """SIGTERM and SIGUSR1 in each phase."""
    for place in Place:
        for name, number in (("SIGTERM", 15), ("SIGUSR1", 10)):
            run = bench.place / f"{name}-{place.value.replace(' ', '-')}"
            code = bench.run(run, signal_in(place, number))[0]
            start_up = place is Place.START_UP
            promised = "ends at once, nothing written" if start_up else "saves, exit 143, nothing lost"
            bench.judge(f"{name}, {place.value}", promised, run, code, (-number,) if start_up else (143,))
            yield name


def damage(bench: Bench, *, resume_all: bool) -> Iterator[str]:
    """Every file of the newest checkpoint truncated, flipped, missing; and the whole checkpoint gone."""
    stopped = bench.place / "stopped"
    bench.run(stopped, signal_in(Place.STEP, 15))
    steps = [step for step, _ in list_checkpoints(stopped / "checkpoints")]
    newest, before = stopped / "checkpoints" / f"step-{steps[-1]:08d}", steps[-2]
    for index, (name, path) in enumerate(sorted((path.name, path) for path in newest.iterdir())):
        for kind, break_it in DAMAGES.items():
            run = bench.place / "damaged"
            shutil.copytree(stopped, run)
            broken = run / path.relative_to(stopped)
            break_it(broken)
            promise = "found and named; goes back one checkpoint"
            if resume_all or index == list(DAMAGES).index(kind):
                code = bench.resume(run)
                found = f"{newest.name} is damaged" in bench.said() and f"resuming after step {before}" in bench.said()
                same = code == 0 and same_as(bench.undisturbed, run)
                happened = f"resumed after step {before}, {'the same' if same else 'NOT the same'}; {found=}"
            else:
                fault = fault_in(broken.parent)
                found, same = fault is not None, True
                happened = f"not resumed here; found: {fault}"
            bench.rows.append(Row(f"{name} {kind}", promise, happened, steps[-1] - before, found and same))
            shutil.rmtree(run)
            yield name
    shutil.copytree(stopped, run)
    shutil.rmtree(run / newest.relative_to(stopped))
    code = bench.resume(run)
    found = "the last that was saved, is gone" in bench.said()
    kept = found and code == 0 and same_as(bench.undisturbed, run)
    bench.rows.append(Row("newest checkpoint gone", "detected by the pointer, logged", f"{found=}", None, kept))
    (run / "checkpoints" / LATEST).unlink(missing_ok=True)
    yield "gone"


def machine(bench: Bench) -> Iterator[str]:
    """A file-size limit, a small disk, a read-only one, a failing tracker, non-finite numbers."""
    run = bench.place / "limit"
    bench.judge(
        "file-size limit reached at the second save",
        "exit 5, older ones untouched",
        run,
        bench.run(run, full_disk())[0],
        (5,),
    )
    yield "limit"
    run = bench.place / "not-finite"
    bench.judge(
        "NaN in a parameter after step 3", "exit 6, no update from it", run, bench.run(run, poison_after(3))[0], (6,)
    )
    yield "NaN"
    run = bench.place / "tracker"
    code = bench.run(run, tracker_down_after(2), "logging=wandb")[0]
    bench.judge("tracker fails at step 2 (stub)", "logged once, the run continues", run, code, (0,))
    yield "tracker"
    disk = bench.place / "disk"
    with mounted(disk, small_disk_bytes(bench.undisturbed)) as works:
        run, fault = disk / "run", "disk full at a save (tmpfs)"
        if works:
            code = bench.run(run)[0]
            said = bench.said()
            spared = [fault_in(path) for _, path in list_checkpoints(run / "checkpoints")] == [None]
            happened = f"{code_text(code)} ({last_line(said)[:90]}); the older checkpoint is whole: {spared}"
            bench.rows.append(
                Row(fault, "exit 5, older ones untouched", happened, steps_made(run) - EVERY, code == 5 and spared)
            )
        else:
            log.info(f"not tried: {fault}: this process may not mount")
    yield "disk"
    with mounted(disk, 1 << 28) as works:
        run, fault = disk / "run", "run directory read-only (tmpfs)"
        if works:
            bench.run(run, signal_in(Place.STEP, 15))
            with remounted_read_only(disk):
                code = bench.resume(run)
                happened = f"{code_text(code)} ({last_line(bench.said())[:110]})"
            again = bench.resume(run) == 0 and same_as(bench.undisturbed, run)
            happened += f"; writable again: {'the same' if again else 'NOT the same'}"
            bench.rows.append(Row(fault, "exit 5, nothing changed", happened, 0, code == 5 and again))
        else:
            log.info(f"not tried: {fault}: this process may not mount")
    yield "read-only"


def writers(bench: Bench, only: Sequence[str]) -> Iterator[str]:
    """Commands that write, killed before every file operation, and started twice at once."""

    def start(arguments: list[str], hook: Hook) -> int:
        return bench.wait(bench.start(arguments, hook))

    found = writer_rows(start, bench.start, bench.wait, bench.undisturbed, bench.place, only)
    for fault, promised, happened, kept in found:
        bench.rows.append(Row(fault, promised, happened, None, kept))
        yield fault


def table(rows: list[Row], seconds: float, command: str) -> str:
    """The table in Markdown, with the machine and versions."""
    kept = sum(row.kept for row in rows)
    packages = ("torch", "transformers", "peft", "safetensors")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [
        f"# Faults, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python bench/faults.py {command}` on {platform.platform()}, {os.cpu_count()} cores that others use too, "
        f"{seconds / 60:.0f} minutes: {kept} of {len(rows)} promises kept. Python {platform.python_version()}, "
        f"{versions}, finetune {__version__}.",
        "",
        f"Runs of {STEPS} steps, a save every {EVERY}, written in the background. 'The same': metrics, adapter, "
        "optimiser, loop state and evaluation equal the undisturbed run's to the last bit; for commands that write: "
        "the same files, but for the date in export.json and README.md.",
        "",
        "| fault | promised | happened | steps lost | kept |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lost = "" if row.lost is None else str(row.lost)
        happened = row.happened.replace("|", "/")
        lines.append(f"| {row.fault} | {row.promised} | {happened} | {lost} | {'yes' if row.kept else '**NO**'} |")
    return "\n".join(lines) + "\n"


def run_all(args: argparse.Namespace) -> int:
    """Run the parts that were asked for; 1 if a guarantee was broken."""
    started = time.monotonic()
    moments = random.Random(args.seed)
    command = f"--kills {args.kills}" + (f" --parts {' '.join(args.parts)}" if args.parts else "")
    command += f" --commands {shlex.join(args.commands)}" if args.commands else ""
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
        bench = Bench(Path(place))
        parts: dict[str, Callable[[], Iterator[str]]] = {
            "kills": lambda: kills(bench, args.kills, moments),
            "signals": lambda: signals(bench),
            "damage": lambda: damage(bench, resume_all=args.resume_all),
            "machine": lambda: machine(bench),
            "writers": lambda: writers(bench, args.commands),
        }
        with log.Progress("faults", None, "faults") as progress:
            for part in args.parts or parts:
                for name in parts[part]():
                    progress.advance(details=name)
                    text = table(bench.rows, time.monotonic() - started, command)
                    if args.out:
                        args.out.write_text(text)
    log.result(text)
    return 0 if all(row.kept for row in bench.rows) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", choices=["kills", "signals", "damage", "machine", "writers"])
    parser.add_argument("--commands", nargs="*", default=[], help="writers of these words alone; `pair`: two at once")
    parser.add_argument("--resume-all", action="store_true", help="resume after every single damage, not one of a kind")
    parser.add_argument("--out", type=Path)
    sys.exit(run_all(parser.parse_args()))
