"""`finetune base tiny`: write a small checkpoint in the exact published file layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    tiny = actions.add_parser("tiny", help="a gpt-oss small enough to train on a CPU")
    tiny.add_argument("directory", metavar="DIR", type=Path, help="where to write it; must not exist yet")
    tiny.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    tiny.add_argument(
        "--random",
        action="store_true",
        help="random weights throughout; without it the embeddings are constructed from the shipped texts, which is "
        "what lets so small a model learn at all",
    )


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint and say where it is."""
    from finetune.model.tiny import write_tiny_base

    write_tiny_base(args.directory, seed=args.seed, constructed=not args.random)
    say(str(args.directory), result=True)
