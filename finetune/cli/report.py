"""`finetune report RUN`: write report.html and report.md anew, also for a run that is still going or died."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.config.keys import suggest_word
from finetune.console import say
from finetune.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")


def run(args: argparse.Namespace) -> None:
    """Write both, and say where.

    Raises:
        InputError: not a run directory.
    """
    from finetune.report.html import write_reports

    path: Path = args.run
    if not (path / "config.yaml").is_file() and not (path / "manifest.json").is_file():
        runs = sorted(file.parent.name for file in path.parent.glob("*/config.yaml"))
        fix = suggest_word(path.name, runs) or (f"runs there: {', '.join(runs[-5:])}" if runs else None)
        raise InputError(f"{path} is not a run directory: it has neither config.yaml nor manifest.json", fix=fix)
    say(str(write_reports(path)), result=True)
