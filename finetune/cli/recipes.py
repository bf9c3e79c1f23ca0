"""`finetune recipes`: list the shipped recipes, or show one's file."""

from __future__ import annotations

import argparse

from finetune.config.recipes import find_recipe, first_comment, list_recipes
from finetune.console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    show = actions.add_parser("show", help="print a recipe's file")
    show.add_argument("name", metavar="NAME", help="a recipe from the list")


def run(args: argparse.Namespace) -> None:
    """Print the list, or the file, to standard output."""
    if args.action == "show":
        say(find_recipe(args.name).read_text(encoding="utf-8").rstrip(), result=True)
        return
    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, path in recipes.items():
        say(f"{name:{width}}  {first_comment(path)}", result=True)
