"""`finetune base tiny`: write a small checkpoint in the exact published file layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune import log
from finetune.cli.arguments import add_action, add_examples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    tiny = add_action(actions, "tiny", "write a gpt-oss that is small enough to train on a CPU")
    tiny.add_argument("directory", metavar="DIR", type=Path, help="where to write it; must not exist yet")
    tiny.add_argument(
        "--seed", type=int, metavar="N", default=0, help="the same seed gives the same bytes (default: 0)"
    )
    tiny.add_argument(
        "--kind",
        choices=("pretrained", "random"),
        default="pretrained",
        help="pretrained: the shipped weights, trained on the shipped texts (default); random: drawn from the seed",
    )
    add_examples(parser, "finetune base tiny base/tiny", "finetune base tiny base/random --kind random --seed 1")
    # The older way to say `--kind random`.
    tiny.add_argument("--random", action="store_const", const="random", dest="kind", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint and print its directory."""
    log.info(f"making a tiny gpt-oss ({args.kind})")
    from finetune.model.tiny import write_tiny_base

    write_tiny_base(args.directory, seed=args.seed, kind=args.kind)
    log.result(str(args.directory))
