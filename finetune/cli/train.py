"""`finetune train`: run a recipe, print its plan (`--dry-run`), sweep over settings, or resume a run."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from finetune import log
from finetune.cli.arguments import add_examples, add_recipe, recipe_and_overrides
from finetune.config.derive import check_inputs, learning_rate_line
from finetune.config.schema import RunConfig
from finetune.config.validate import resumed_config
from finetune.errors import ConfigError
from finetune.train.launch import launch, watch_parent
from finetune.train.run_directory import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    usage = "finetune train RECIPE [key=value ...] [--dry-run] [--sweep key=a,b]\n"
    usage += "       finetune train --resume RUN [distributed.KEY=VALUE ...]"
    add_recipe(parser, usage)
    parser.add_argument("--dry-run", action="store_true", help="check everything that needs no model, then stop")
    parser.add_argument(
        "--sweep", metavar="KEY=A,B", action="append", help="one run per value; given repeatedly, one per combination"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        type=Path,
        help="continue a run from its last intact checkpoint (only `distributed` may change), or go on with a sweep",
    )
    add_examples(
        parser,
        "finetune train quickstart --dry-run                 # configuration, data and sites; no model is loaded",
        "finetune train quickstart trainer.max_steps=20 name=first",
        "finetune train --resume runs/first",
        "finetune train mine.yaml --sweep trainer.learning_rate=1e-4,2e-4 --sweep adapter.experts.rank=2,4",
        "finetune train legal_20b distributed=zero3 distributed.num_processes=2",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end: figures and paths")
    parser.add_argument("--worker", metavar="RUN", type=Path, help=argparse.SUPPRESS)  # how `launch` starts a new run


def run(args: argparse.Namespace) -> None:
    """Train, or print the plan.

    Raises:
        ConfigError: no recipe, or one beside `--resume`; `--json` where nothing is trained.
    """
    if args.json and (args.dry_run or args.sweep):
        other = "--dry-run" if args.dry_run else "--sweep"
        raise ConfigError(f"--json does not go with {other}", fix="leave one of the two out")
    with log.results_to_stderr(args.json):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    watch_parent()
    if args.resume is not None:
        _resume(args)
        return
    if args.worker is not None:
        from finetune.cli.preflight import explained_out_of_memory
        from finetune.report.html import write_reports
        from finetune.train.run import train

        run = Run.open(args.worker)
        with explained_out_of_memory(run.config):
            run_directory = train(run, write_reports)
        _print_outcome(run_directory, as_json=args.json)
        return
    recipe, overrides = recipe_and_overrides(args)
    if args.sweep:
        if args.dry_run:
            raise ConfigError("--sweep does not go with --dry-run", fix="dry-run one of its combinations")
        from finetune.cli.sweep import sweep

        sweep(recipe, overrides, args.sweep)
        return

    from finetune.config.compose import compose

    composed = compose(recipe, overrides)
    if args.dry_run:
        from finetune.cli.preflight import dry_run

        dry_run(recipe, composed)
        return
    from finetune.cli.preflight import check_memory, explained_out_of_memory

    check_inputs(composed.config)
    check_memory(composed.config)
    log.info(learning_rate_line(composed.config))
    if starts_processes(composed.config):
        run = Run.create(composed.config, composed.recipe_name, composed.overrides)
        with run.discarded_if_unused():
            count = composed.config.distributed.num_processes
            launch(["train", "--worker", str(run.path), *_json(args)], count, run)
        return
    log.info(log.LOADING)
    from finetune.report.html import write_reports
    from finetune.train.run import train

    with explained_out_of_memory(composed.config):
        run_directory = train(composed, write_reports)
    _print_outcome(run_directory, as_json=args.json)


def _resume(args: argparse.Namespace) -> None:
    from finetune.cli.sweep import PLAN, resume_sweep

    is_sweep = (args.resume / PLAN).is_file()
    others = [word for word in args.words if is_sweep or not word.startswith(("distributed=", "distributed."))]
    if others or args.dry_run or args.sweep:
        given = " ".join(others) or ("--dry-run" if args.dry_run else "--sweep")
        why = (
            "a resumed run keeps the configuration it was started with (its config.yaml); only `distributed` may change"
        )
        fix = f"finetune train --resume {args.resume}"
        raise ConfigError(f"--resume does not go with {given}", why=why, fix=fix)
    if is_sweep:
        if args.json:
            raise ConfigError("--json does not go with a sweep", fix="leave it out")
        resume_sweep(args.resume)
        return
    stored = Run.open(args.resume.resolve())
    stored.check_unedited()
    run = replace(stored, config=resumed_config(stored.config, args.words))
    if starts_processes(run.config):
        words = ["train", "--resume", str(run.path), *args.words, *_json(args)]
        launch(words, run.config.distributed.num_processes, run)
        return
    log.info(log.LOADING)
    from finetune.cli.preflight import explained_out_of_memory
    from finetune.report.html import write_reports
    from finetune.train.run import train

    with explained_out_of_memory(run.config):
        run_directory = train(run, write_reports)
    _print_outcome(run_directory, as_json=args.json)


def starts_processes(config: RunConfig) -> bool:
    """Whether this command starts the ranks of a run: there are several, and no launcher has started them."""
    return config.distributed.kind != "single" and "RANK" not in os.environ


def _json(args: argparse.Namespace) -> list[str]:
    return ["--json"] if args.json else []


def _print_outcome(run_directory: Path, *, as_json: bool) -> None:
    """Print the result of a run and its paths."""
    from finetune.report.markdown import outcome, outcome_record

    if as_json:
        log.result_json(outcome_record(run_directory))
    else:
        log.result(outcome(run_directory))
