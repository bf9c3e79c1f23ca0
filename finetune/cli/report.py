"""`finetune report RUN`: rewrite report.html and report.md, also for a running or failed run."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune import log
from finetune.cli.arguments import add_examples
from finetune.config.suggest import suggest_run
from finetune.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="a run directory; the run may still be running, or have failed"
    )
    add_examples(parser, "finetune report runs/first")


def run(args: argparse.Namespace) -> None:
    """Write both and print their place.

    Raises:
        InputError: not a run directory.
    """
    from finetune.report.html import write_reports

    path: Path = args.run
    if not (path / "config.yaml").is_file() and not (path / "manifest.json").is_file():
        what = "has neither config.yaml nor manifest.json" if path.is_dir() else "does not exist"
        raise InputError(f"{path} is not a run directory: it {what}", fix=suggest_run(path))
    log.result(str(write_reports(path)))
