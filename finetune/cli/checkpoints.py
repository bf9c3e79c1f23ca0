"""`finetune checkpoints verify RUN`: which checkpoints are whole, what is wrong with others, what resuming takes."""

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
    """Hash and list.

    Raises:
        InputError: no run, no checkpoint, or one that is not whole.
    """
    from finetune.train.checkpoint import fault_in, latest_step, left_overs, list_checkpoints
    from finetune.train.run_directory import RunDirectory

    directory = RunDirectory(args.run).checkpoints
    found = list_checkpoints(directory)
    if not found:
        RunDirectory.open(args.run)  # raises, and names runs near by, if this is none
        raise InputError(f"run {args.run} has no checkpoint", fix="start it again; save.every_steps says how often")
    taken, damaged = None, 0
    for step, path in found:
        fault = fault_in(path)
        if fault is None:
            taken = step
        damaged += fault is not None
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else 0
        log.result(f"{path.name}  {'whole' if fault is None else f'damaged: {fault}'}  {size / 2**20:,.1f} MiB")
    for path in left_overs(directory):
        log.result(f"{path.name}  left by a save that was cut short; the next save removes it")
    latest = latest_step(directory)
    lost = latest is not None and latest not in dict(found)
    if lost:
        log.result(f"step-{latest:08d}  gone: it was saved last, and is not there")
    if taken is None:
        raise InputError(f"no whole checkpoint in {directory}", fix="start the run again")
    log.result(f"a resume goes on after step {taken}")
    if damaged or lost:
        what = f"{damaged} of {len(found)} checkpoints are damaged" if damaged else "the last checkpoint is gone"
        raise InputError(
            f"{what} in {directory}", fix=f"`finetune train --resume {args.run}` goes on after step {taken}"
        )
