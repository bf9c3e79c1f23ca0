"""`finetune recipes`: list the shipped recipes, show one's file, or write one for your own data."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.config.recipes import find_recipe, first_comment, list_recipes
from finetune.console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    show = actions.add_parser("show", help="print a recipe's file")
    show.add_argument("name", metavar="NAME", help="a recipe from the list")
    new = actions.add_parser("new", help="write a recipe of your own")
    new.add_argument("path", metavar="PATH", type=Path, help="the new .yaml file")
    new.add_argument("--data", metavar="FILE", help="training records to look at; the recipe will run on them")
    new.add_argument("--from", dest="source", metavar="NAME", help="begin from a copy of a shipped recipe")
    new.add_argument("--model", default="gpt_oss_20b", help="an option of configs/model/ (default: gpt_oss_20b)")


def run(args: argparse.Namespace) -> None:
    """Print the list, or a file, to standard output; or write a new one."""
    if args.action == "new":
        from finetune.cli.new_recipe import new_recipe

        new_recipe(args.path, source=args.source, data=args.data, model=args.model)
        return
    if args.action == "show":
        say(find_recipe(args.name).read_text(encoding="utf-8").rstrip(), result=True)
        return
    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, path in recipes.items():
        say(f"{name:{width}}  {first_comment(path)}", result=True)
