"""Compare the working tree with v0.1.0 bit for bit: train, resume, ranks, routers and exports, on this machine.

    python scripts/golden.py                            every stage (about 25 CPU minutes)
    python scripts/golden.py --quick                    few steps, no zero2 and no merges (under 2 CPU minutes)
    python scripts/golden.py --stage train --stage exports
    python scripts/golden.py --quick --control          a changed learning rate: must be reported as different

Both commits run on one thread, each in processes of its own. Compared are figures without times, every tensor, bytes of
adapters, evaluations and exports; not compared are times, paths, versions, texts, and keys that v0.1.0 did not have.
Exits with 1 on a difference and names the first.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from golden_compare import Difference, compare_exports, compare_runs

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ("v0.1.0", "af10aae")  # the tag, and its commit for clones without tags
# Keys that were renamed after v0.1.0: the reference is given the old ones.
OLD_KEYS = {
    "trainer.gradient_accumulation_steps": "trainer.micro_steps",
    "evaluate.validation_examples": "evaluate.validation_rows",
    "evaluate.test_examples": "evaluate.test_rows",
    "evaluate.routing_examples": "evaluate.routing_samples",
    "export.survival_examples": "export.survival_rows",
}
ADAPTER_EXPORTS = ("peft", "sglang", "gguf-lora", "mlx")
MERGED_EXPORTS = ("bf16", "mxfp4", "gguf")
EXPORT_SCRIPT = """
import json, sys
from finetune.cli.main import main
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    if code:
        sys.exit(f"finetune {' '.join(arguments)} ended with {code}")
"""
SMALL_RECIPE = """# @package _global_
defaults:
  - override /model: tiny
  - override /data: own
data:
  train: {mine: {path: %(rows)s/train.jsonl}}
  validation: {mine: {path: %(rows)s/validation.jsonl}}
  test: {mine: {path: %(rows)s/test.jsonl}}
  max_length: 700
adapter: {attention: {rank: 4}, experts: {rank: 4}}
trainer: {epochs: 2, learning_rate: 1.0e-2}
evaluate: {every_steps: 4}
save: {every_steps: 4}
export: {read_back: never}
"""


@dataclass(frozen=True)
class Settings:
    """Amount of work: optimiser steps of the quickstart and of the small runs, and what is exported."""

    quick: bool
    train_steps: int
    small_steps: int
    exports: tuple[str, ...]


QUICK = Settings(quick=True, train_steps=5, small_steps=4, exports=ADAPTER_EXPORTS)
FULL = Settings(quick=False, train_steps=40, small_steps=8, exports=(*ADAPTER_EXPORTS, *MERGED_EXPORTS))


class CommandFailed(Exception):
    """A command of one commit ended with an error."""


@dataclass(frozen=True)
class Side:
    """One of the two commits.

    Attributes:
        name: `reference` or `tree`.
        tree: its source.
        out: directory of its runs.
        old_keys: it is called with the configuration keys of v0.1.0.
        extra: overrides of every run, for the control.
    """

    name: str
    tree: Path
    out: Path
    old_keys: bool
    extra: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """One thread, this source alone, and a cache of its own."""
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        return os.environ | {
            "PYTHONPATH": str(self.tree),
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(self.out / "cache"),
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(home / "torch_extensions")),
        }

    def command(self, arguments: Sequence[str]) -> list[str]:
        """`finetune ARGUMENTS`, with keys as this commit spells them."""
        if self.old_keys:
            arguments = [
                f"{OLD_KEYS.get(key, key)}{equals}{value}"
                for key, equals, value in (argument.partition("=") for argument in arguments)
            ]
        return [sys.executable, "-m", "finetune", *arguments]

    def run(self, command: list[str]) -> None:
        """Run a command of this commit to its end; its output goes to a log."""
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.txt").open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(command, stdout=log, stderr=log, env=self.environment(), cwd=self.out, check=False)
        if done.returncode:
            lines = (self.out / "log.txt").read_text().splitlines()
            errors = [line for line in lines if line.startswith("error:")]
            cause = errors[-1] if errors else lines[-1]
            raise CommandFailed(f"{self.name}: exit {done.returncode}: {cause} ({self.out / 'log.txt'})")

    def train(self, name: str, recipe: str, *overrides: str) -> Path:
        """A run called `name`, reused if it exists already."""
        run = self.out / name
        if not (run / "evaluation.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            self.run(self.command(train_arguments(self, name, recipe, *overrides)))
        return run


def train_arguments(side: Side, name: str, recipe: str, *overrides: str) -> list[str]:
    """`train RECIPE ...` into the side's own directory."""
    places = [f"model.path={side.out.parent / 'base'}", f"output_dir={side.out}", f"name={name}"]
    return ["train", recipe, *places, *overrides, *side.extra]


def small_recipe(side: Side) -> str:
    """Path of the small recipe."""
    return str(side.out.parent / "small.yaml")


def train(side: Side, settings: Settings) -> Path:
    """The quickstart's first steps, evaluated on few examples."""
    steps = settings.train_steps
    size = 8 if settings.quick else 40
    return side.train(
        "train",
        "quickstart",
        f"trainer.max_steps={steps}",
        f"evaluate.every_steps={(steps + 1) // 2}",
        f"save.every_steps={(steps + 1) // 2}",
        f"evaluate.validation_examples={size}",
        f"evaluate.test_examples={size}",
        f"evaluate.routing_examples={size}",
        "export.survival_examples=16",
        "export.calibration_tokens=8192",
        f"export.read_back={'never' if settings.quick else 'always'}",
    )


def resume(side: Side, settings: Settings) -> Path:
    """Kill a run after its first checkpoint (a copy stays as `killed`) and resume it."""
    run = side.out / "resume"
    if not (run / "evaluation.json").exists():
        for directory in (run, side.out / "killed"):
            shutil.rmtree(directory, ignore_errors=True)
        steps = (f"trainer.max_steps={2 * settings.small_steps}", "trainer.gradient_accumulation_steps=1")
        arguments = train_arguments(side, "resume", small_recipe(side), *steps)
        kill_after_checkpoint(side, side.command(arguments), run)
        shutil.copytree(run, side.out / "killed")
        side.run(side.command(["train", "--resume", str(run)]))
    return run


def kill_after_checkpoint(side: Side, command: list[str], run: Path) -> None:
    """Start a run and kill it as soon as its first checkpoint is complete."""
    side.out.mkdir(parents=True, exist_ok=True)
    with (side.out / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=side.environment(), cwd=side.out)
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "checkpoints" / "latest").exists():
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not (run / "checkpoints" / "latest").exists():
        raise CommandFailed(f"{side.name}: no checkpoint was written ({side.out / 'log.txt'})")


def processes(kind: str) -> Callable[[Side, Settings], Path]:
    """A small run on two ranks."""

    def produce(side: Side, settings: Settings) -> Path:
        steps = (f"trainer.max_steps={settings.small_steps}", "trainer.gradient_accumulation_steps=1")
        return side.train(kind, small_recipe(side), *steps, f"distributed={kind}")

    return produce


def router(side: Side, settings: Settings) -> Path:
    """Routers trained whole, balance loss of the whole step, and an adapter on the four most used experts."""
    return side.train(
        "router",
        small_recipe(side),
        f"trainer.max_steps={settings.small_steps}",
        "trainer.gradient_accumulation_steps=2",
        "adapter.router.mode=full",
        "adapter.experts.select=top_k=4",
        "trainer.router_balance_coefficient=0.01",
        "trainer.router_balance_scope=step",
    )


def exports(side: Side, settings: Settings) -> Path:
    """Every export of the quickstart's adapter."""
    run, out = train(side, settings), side.out / "exports"
    targets = [target for target in settings.exports if not (out / target).exists()]
    options = {"mxfp4": ["--rounding", "compensated"], "gguf": ["--gguf-experts", "mxfp4"]}
    verify = ["--no-verify"] if settings.quick else []
    commands = [
        ["export", str(run), "--to", target, "--out", str(out / target), *options.get(target, []), *verify]
        for target in targets
    ]
    if commands:
        out.mkdir(exist_ok=True)
        side.run([sys.executable, "-c", EXPORT_SCRIPT, json.dumps(commands)])
    return out


STAGES: dict[str, Callable[[Side, Settings], Path]] = {
    "train": train,
    "resume": resume,
    "ddp": processes("ddp"),
    "zero2": processes("zero2"),
    "router": router,
    "exports": exports,
}


def compare(stage: str, settings: Settings, reference: Side, tree: Side) -> list[Difference]:
    """Run a stage on the tree and compare it with the reference's results, which exist already."""
    produce = STAGES[stage]
    made = [produce(side, settings) for side in (reference, tree)]
    if stage == "exports":
        return [
            Difference(f"{target}: {found.item}", found.detail)
            for target in settings.exports
            for found in compare_exports(made[0] / target, made[1] / target)
        ]
    found = compare_runs(*made)
    if stage == "resume":  # the reference's run, resumed by the tree
        crossed = tree.out / "resumed-from-reference"
        shutil.copytree(reference.out / "killed", crossed)
        try:
            tree.run(tree.command(["train", "--resume", str(crossed)]))
        except CommandFailed as error:
            return [*found, Difference("resumed across commits", str(error))]
        found += [Difference(f"resumed across commits: {d.item}", d.detail) for d in compare_runs(made[0], crossed)]
    return found


def prepare(reference: Side) -> None:
    """The base, 40 real records and a recipe, made by the reference, for both."""
    root = reference.out.parent
    if not (root / "base").exists():
        reference.run(reference.command(["base", "tiny", str(root / "base")]))
    path = reference.tree / "data" / "legal" / "cuad_clause_type.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [line for line in file if len(line) < 2200]
    wanted = ("License Grant", "Audit Rights", "Governing Law")
    lines = [line for line in lines if json.loads(line)["answer"] in wanted][:40]
    for name, part in (("train", lines[:24]), ("validation", lines[24:30]), ("test", lines[30:])):
        (root / f"{name}.jsonl").write_text("".join(part))
    (root / "small.yaml").write_text(SMALL_RECIPE % {"rows": root})


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One process at a time makes the reference's results."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def reference_tree(revision: str) -> Iterator[Path]:
    """A worktree of a commit, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def reference_revision() -> str:
    """The tag v0.1.0, or its commit where tags were not fetched."""
    for name in REFERENCE:
        command = ["git", "-C", str(ROOT), "rev-parse", "-q", "--verify", f"{name}^{{commit}}"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return name
    sys.exit(f"neither {' nor '.join(REFERENCE)} is in this clone: git fetch --tags --unshallow")


def fingerprint(settings: Settings) -> str:
    """Fingerprint of what determines the reference's bits: stored results of another machine are not used."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}-{capability}-torch{torch.__version__}-{'quick' if settings.quick else 'full'}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=list(STAGES), help="may be repeated (default: all)")
    parser.add_argument("--quick", action="store_true", help="few steps; zero2 and merges are left out")
    parser.add_argument("--control", action="store_true", help="another learning rate: 0 if every stage shows it")
    parser.add_argument("--keep-tree", action="store_true", help="leave the tree's results under --keep")
    parser.add_argument("--old-keys", action="store_true", help="give the tree v0.1.0's configuration keys too")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the reference's results for the next time")
    return parser.parse_args()


def main() -> None:
    """Run the stages, print a table, end with 1 on a difference."""
    args = parse_arguments()
    settings = QUICK if args.quick else FULL
    stages = args.stage or [stage for stage in STAGES if not (args.quick and stage == "zero2")]
    different = []
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch, reference_tree(reference_revision()) as source:
        root = Path(args.keep or scratch).resolve() / fingerprint(settings)
        reference = Side("reference", source, root / "reference", old_keys=True)
        extra = ("trainer.learning_rate=5.05e-3",) if args.control else ()
        tree = Side("tree", ROOT, root / f"tree-{os.getpid()}", old_keys=args.old_keys, extra=extra)
        print(f"{reference_revision()} and {ROOT} on {fingerprint(settings)}, one thread")
        with locked(root):
            prepare(reference)
            for stage in stages:
                STAGES[stage](reference, settings)
        try:
            for stage in stages:
                started = time.monotonic()
                try:
                    found = compare(stage, settings, reference, tree)
                except CommandFailed as error:
                    found = [Difference("command", str(error))]
                first = f"first: {found[0].item}: {found[0].detail}" if found else ""
                verdict = f"{len(found)} differences" if found else "the same"
                print(f"{stage:8} {verdict:16} {time.monotonic() - started:6.0f} s  {first}", flush=True)
                different += [stage] if found else []
        finally:
            if not args.keep_tree:
                shutil.rmtree(tree.out, ignore_errors=True)
    if args.control:
        missed = [stage for stage in stages if stage not in different]
        sys.exit(f"the control was not noticed by {', '.join(missed)}" if missed else 0)
    sys.exit(f"different: {', '.join(different)}" if different else 0)


if __name__ == "__main__":
    main()
