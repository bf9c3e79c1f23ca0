"""Parsing shared by the commands: errors as `ConfigError`, suggestions for misspelt words, overrides anywhere."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from finetune.config.keys import suggest_word
from finetune.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and raises instead of exiting."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into ours.

        Raises:
            ConfigError: always.
        """
        choice = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)", message)
        fix = suggest_word(choice[1], choice[2].replace("'", "").split(", ")) if choice else None
        raise ConfigError(f"{self.prog}: {message}", fix=fix or f"see `{self.prog} --help`")


def refuse_unknown_word(word: str | None, known: Iterable[str], command: str) -> None:
    """Stop at a word that is not one of a command's own, naming the nearest.

    Raises:
        ConfigError: the word is not known. None is fine.
    """
    words = list(known)
    if word is not None and word not in words:
        fix = suggest_word(word, words) or f"one of {', '.join(words)}; see `{command} --help`"
        raise ConfigError(f"there is no `{command} {word}`", fix=fix)


def add_recipe(parser: argparse.ArgumentParser, usage: str) -> None:
    """Add RECIPE and the overrides that follow it; `recipe_and_overrides` reads them.

    Args:
        parser: the command's parser.
        usage: its usage line, since argparse has no word for "one, then many of another kind".
    """
    parser.usage = usage
    parser.add_argument(
        "words",
        metavar="RECIPE",
        nargs="*",
        help="a shipped recipe's name or a YAML file's path; then settings that win over the recipe's, such as "
        "trainer.epochs=1, or a group's option, such as model=tiny",
    )


def recipe_and_overrides(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Split what `add_recipe` collected.

    Raises:
        ConfigError: no recipe was given, or an override stands before it.
    """
    words: list[str] = args.words
    if not words or "=" in words[0]:
        before = f" before {words[0]}" if words else ""
        raise ConfigError(f"finetune {args.command} needs a recipe{before}", fix="`finetune recipes` lists them")
    return words[0], words[1:]


def parse(parser: Parser, arguments: list[str], usage: str) -> argparse.Namespace:
    """Parse, and accept overrides after an option too, where argparse itself no longer looks for them.

    Args:
        parser: the whole command's parser.
        arguments: what to parse.
        usage: the chosen subcommand's usage line, which names its options.

    Raises:
        ConfigError: something is left over that is not an override.
    """
    args, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-") or not hasattr(args, "words"):
            fix = suggest_word(word.partition("=")[0], re.findall(r"--[a-z-]+", usage))
            see = f"see `{parser.prog} {args.command} --help`"
            raise ConfigError(f"{parser.prog} {args.command} does not take {word}", fix=fix or see)
        args.words.append(word)
    return args
