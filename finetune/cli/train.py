"""`finetune train`: run a recipe, show what it would do, or go on with a run that stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.cli.arguments import add_recipe, recipe_and_overrides
from finetune.console import say
from finetune.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_recipe(
        parser,
        "finetune train RECIPE [key=value ...] [--dry-run] [--sweep key=a,b]\n       finetune train --resume RUN",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything that needs no model, and stop")
    parser.add_argument(
        "--sweep", metavar="KEY=A,B", action="append", help="run every value, and every combination if given again"
    )
    parser.add_argument("--resume", metavar="RUN", type=Path, help="go on from a run directory's last checkpoint")


def run(args: argparse.Namespace) -> None:
    """Train, or print the plan.

    Raises:
        ConfigError: no recipe, or one beside `--resume`.
    """
    if args.resume is not None:
        if args.words or args.dry_run or args.sweep:
            given = " ".join(args.words) or ("--dry-run" if args.dry_run else "--sweep")
            why = "a resumed run keeps the configuration it was started with (its config.yaml)"
            fix = f"finetune train --resume {args.resume}"
            raise ConfigError(f"--resume does not go with {given}", why=why, fix=fix)
        from finetune.cli.memory import config_of_run, explained_out_of_memory
        from finetune.report.markdown import write_report
        from finetune.train.run import resume

        with explained_out_of_memory(config_of_run(args.resume)):
            run_directory = resume(args.resume, write_report)
        _print_outcome(run_directory)
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
        from finetune.cli.dry_run import dry_run

        dry_run(composed.config)
        return
    from finetune.cli.memory import check_memory, explained_out_of_memory

    check_memory(composed.config)
    from finetune.report.markdown import write_report
    from finetune.train.run import train

    with explained_out_of_memory(composed.config):
        run_directory = train(composed, write_report)
    _print_outcome(run_directory)


def _print_outcome(run_directory: Path) -> None:
    """The last thing a person sees: what was gained, and where it is."""
    from finetune.report.markdown import outcome

    say(outcome(run_directory), result=True)
