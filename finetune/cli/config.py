"""`finetune config show`: what a recipe and overrides come to, every default written out."""

from __future__ import annotations

import argparse
import json

from finetune.cli.arguments import add_recipe, recipe_and_overrides
from finetune.console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print the whole configuration as YAML")
    add_recipe(show, "finetune config show RECIPE [key=value ...] [--json]")
    show.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the composed and checked configuration to standard output."""
    from finetune.config.compose import compose
    from finetune.config.deepspeed import deepspeed_lines
    from finetune.config.validate import dump_yaml, to_plain

    recipe, overrides = recipe_and_overrides(args)
    config = compose(recipe, overrides).config
    if args.json:
        say(json.dumps(to_plain(config), indent=2), result=True)
        return
    say(dump_yaml(config).rstrip(), result=True)
    for line in deepspeed_lines(config):
        say(f"# {line}", result=True)
