"""`finetune checkpoints verify RUN`: state of each checkpoint, and the one that a resume would use."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune import log
from finetune.cli.arguments import add_action, add_examples
from finetune.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = add_action(
        actions, "verify", "hash every file against its manifest", usage="finetune checkpoints verify RUN"
    )
    verify.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    add_examples(parser, "finetune checkpoints verify runs/first")


def run(args: argparse.Namespace) -> None:
    """Verify and list the checkpoints.

    Raises:
        InputError: no run, no checkpoint, or a damaged one.
    """
    from finetune.train.checkpoint import fault_in, latest_step, left_overs, list_checkpoints
    from finetune.train.run_directory import Run

    directory = args.run / "checkpoints"
    found = list_checkpoints(directory)
    if not found:
        Run.open(args.run)  # raises and suggests runs if this is none
        raise InputError(f"run {args.run} has no checkpoint", fix="start it again; save.every_steps sets the interval")
    taken, damaged = None, 0
    for step, path in found:
        fault = fault_in(path)
        if fault is None:
            taken = step
        damaged += fault is not None
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else 0
        log.result(f"{path.name}  {'whole' if fault is None else f'damaged: {fault}'}  {size / 2**20:,.1f} MiB")
    for path in left_overs(directory):
        log.result(f"{path.name}  left by an interrupted save; the next save removes it")
    latest = latest_step(directory)
    lost = latest is not None and latest not in dict(found)
    if lost:
        log.result(f"step-{latest:08d}  missing, although it was saved last")
    if taken is None:
        raise InputError(f"no whole checkpoint in {directory}", fix="start the run again")
    log.result(f"a resume continues after step {taken}")
    if damaged or lost:
        what = f"{damaged} of {len(found)} checkpoints are damaged" if damaged else "the last checkpoint is missing"
        raise InputError(
            f"{what} in {directory}", fix=f"`finetune train --resume {args.run}` continues after step {taken}"
        )
