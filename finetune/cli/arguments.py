"""Argument parsing shared by the commands: errors as `ConfigError` with suggestions, overrides anywhere, help texts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from finetune.config.other_tools import remark_on
from finetune.config.suggest import keys_named, suggest_word
from finetune.errors import ConfigError

# Words of 0.1 that 0.2 still understands, by command; an action counts only right after its command.
OLD_WORDS = {
    "adapter": {"merge": "combine"},
    "evaluate": {"--rows": "--examples"},
    "experts": {"--samples": "--examples"},
}


def with_current_words(arguments: list[str], command: str | None) -> list[str]:
    """Replace a command's words of 0.1 by its present ones.

    >>> with_current_words(["evaluate", "runs/first", "--rows=3"], "evaluate")
    ['evaluate', 'runs/first', '--examples=3']
    """
    old = OLD_WORDS.get(command or "", {})
    words = []
    for number, argument in enumerate(arguments):
        word, equals, value = argument.partition("=")
        is_own = word.startswith("--") or (number > 0 and arguments[number - 1] == command)
        words.append(old[word] + equals + value if word in old and is_own else argument)
    return words


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, keeps the lines of its help, and raises instead of exiting."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a `ConfigError` with a fix.

        Raises:
            ConfigError: always.
        """
        see = f"see `{self.prog} --help`"
        if actions := actions_of(self):
            word = re.search(r"invalid choice: '?([^' ]+)", message)
            what = f"there is no `{self.prog} {word[1]}`" if word else f"{self.prog} needs one more word"
            near = suggest_word(word[1], list(actions)) if word else None
            raise ConfigError(what, fix=near or f"one of {', '.join(actions)}; {see}")
        choice = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)", message)
        near = suggest_word(choice[1], choice[2].replace("'", "").split(", ")) if choice else None
        if near is None and "required" in message and (shown := examples_in(self.epilog)):
            near = f"such as `{shown[0]}`; {see}"
        raise ConfigError(f"{self.prog}: {message}", fix=near or see)


def sentence(summary: str) -> str:
    """Turn a line of the list of commands into the first line of the command's own help.

    >>> sentence("talk with a run's model")
    "Talk with a run's model."
    """
    return f"{summary[0].upper()}{summary[1:]}."


def add_action(actions: Any, name: str, summary: str, **settings: Any) -> argparse.ArgumentParser:
    """Add an action, such as `show` of `finetune config`.

    Args:
        actions: result of `parser.add_subparsers`.
        name: the action's word.
        summary: its line in the list and above its own help.
        settings: arguments of its parser.
    """
    parser: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=sentence(summary), **settings)
    return parser


def add_examples(parser: argparse.ArgumentParser, *lines: str) -> None:
    """Put example calls under a command's help, and each action's own examples under its help.

    Args:
        parser: the command's parser, with its actions.
        lines: whole calls, optionally with a `# comment`; tests/cli/test_help.py parses each of them.
    """
    for prog, each in ((parser.prog, parser), *((action.prog, action) for action in actions_of(parser).values())):
        own = [line for line in lines if line.startswith(prog)]
        shown = "examples:\n" + "\n".join(f"  {line}" for line in own)
        each.epilog = "\n\n".join(text for text in (each.epilog, shown if own else None) if text)


def examples_in(epilog: str | None) -> list[str]:
    """List the example calls at the end of a help text, without their comments."""
    lines = (epilog or "").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.startswith("  finetune ")]


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Map a command's actions to their parsers; empty for a command without actions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def refuse_unknown_word(word: str | None, known: Iterable[str], command: str) -> None:
    """Refuse a word that a command does not know, naming the nearest.

    Raises:
        ConfigError: the word is not known. None passes.
    """
    words = list(known)
    if word is not None and word not in words:
        fix = suggest_word(word, words) or f"one of {', '.join(words)}; see `{command} --help`"
        raise ConfigError(f"there is no `{command} {word}`", fix=fix)


def add_recipe(parser: argparse.ArgumentParser, usage: str) -> None:
    """Add RECIPE and the overrides that follow it; `recipe_and_overrides` reads them.

    Args:
        parser: the command's parser.
        usage: its usage line, since argparse cannot express "one recipe, then many overrides".
    """
    parser.usage = usage
    parser.add_argument(
        "words",
        metavar="RECIPE",
        nargs="*",
        help="a shipped recipe's name or a YAML file's path; then settings that win over the recipe's, such as "
        "trainer.epochs=1, or a group's option, such as model=tiny (`finetune config show RECIPE` prints every key)",
    )


def add_base(parser: argparse.ArgumentParser, what: str = "directory or hub name (default: the adapter's own)") -> None:
    """Add `--base` and `--revision`."""
    parser.add_argument("--base", metavar="BASE", help=what)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub name")


def recipe_and_overrides(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Split what `add_recipe` collected.

    Raises:
        ConfigError: no recipe was given, or an override precedes it.
    """
    words: list[str] = args.words
    if not words or "=" in words[0]:
        before = f" before {words[0]}" if words else ""
        raise ConfigError(f"finetune {args.command} needs a recipe{before}", fix="`finetune recipes` lists them")
    return words[0], words[1:]


def _as_setting(name: str, value: str) -> str | None:
    """Say how a setting that was given as an option is written; None if no key has that name."""
    if remark := remark_on(name):
        return remark
    keys = keys_named(name)
    return f"settings are written without dashes: {' '.join(f'{key}={value}' for key in keys)}" if keys else None


_SWEEP = "a grid of runs is `finetune train RECIPE --sweep key=a,b`, once for each key"
_SHOW = "`finetune config show RECIPE [key=value ...]` prints every setting with what it comes from"
_HYDRA_WORDS = {
    **dict.fromkeys(("-m", "--multirun"), _SWEEP),
    **dict.fromkeys(("-c", "--cfg", "--info", "-p", "--package", "--resolve"), _SHOW),
    **dict.fromkeys(
        ("-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir"), "give the recipe's name or path itself"
    ),
}
"""Options of Hydra's own command line, and what does the same here."""


def parse(parser: Parser, arguments: list[str], usage: str) -> argparse.Namespace:
    """Parse, and accept overrides after an option too, where argparse itself no longer accepts them.

    Args:
        parser: the whole command's parser.
        arguments: words after `finetune`.
        usage: the chosen subcommand's usage line, which names its options.

    Raises:
        ConfigError: a word is left over that is not an override.
    """
    args, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-") or not hasattr(args, "words"):
            name, _, value = word.partition("=")
            if name in _HYDRA_WORDS and hasattr(args, "words"):
                raise ConfigError(f"{parser.prog} {args.command} does not take {word}", fix=_HYDRA_WORDS[name])
            fix = suggest_word(name, re.findall(r"--[a-z-]+", usage))
            if fix is None and hasattr(args, "words"):
                fix = _as_setting(name.lstrip("-").replace("-", "_"), value or "VALUE")
            see = f"see `{parser.prog} {args.command} --help`"
            raise ConfigError(f"{parser.prog} {args.command} does not take {word}", fix=fix or see)
        args.words.append(word)
    return args
