"""`finetune recipes`: list the shipped recipes, print one, or write one for your own data."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune import log
from finetune.cli.arguments import add_action, add_examples
from finetune.config.recipes import find_recipe, list_recipes, recipe_summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    show = add_action(actions, "show", "print a recipe's file")
    show.add_argument("name", metavar="NAME", help="a recipe from the list")
    new = add_action(actions, "new", "write a recipe of your own")
    new.add_argument("path", metavar="PATH", type=Path, help="the new .yaml file")
    new.add_argument("--data", metavar="FILE", help="training records to inspect; the recipe will run on them")
    new.add_argument("--from", dest="source", metavar="NAME", help="start from a copy of a shipped recipe")
    new.add_argument(
        "--model",
        metavar="NAME",
        help="gpt_oss_20b (default), gpt_oss_120b or tiny; --data only",
    )
    add_examples(
        parser,
        "finetune recipes                                    # the list",
        "finetune recipes show legal_20b",
        "finetune recipes new mine.yaml --data mine.jsonl    # inspects the file and writes a recipe that runs",
        "finetune recipes new trial.yaml --data mine.jsonl --model tiny   # to try it on a CPU",
        "finetune recipes new mine.yaml --from legal_20b",
    )


def run(args: argparse.Namespace) -> None:
    """Print the list, or a file, to standard output; or write a new one."""
    if args.action == "new":
        from finetune.cli.new_recipe import new_recipe

        new_recipe(args.path, source=args.source, data=args.data, model=args.model)
        return
    if args.action == "show":
        log.result(find_recipe(args.name).read_text(encoding="utf-8").rstrip())
        return
    log.result_table([(name, recipe_summary(path)) for name, path in list_recipes().items()])
