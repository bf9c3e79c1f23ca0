"""`finetune completion SHELL`: completion of commands, options, recipes, runs, dotted keys and their values."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import get_args, get_origin

from finetune import log
from finetune.cli.arguments import Parser, actions_of, add_action
from finetune.config.recipes import groups, list_recipes, options
from finetune.config.schema_paths import allowed_words, children, takes_keys, type_at

SCRIPTS = {
    "bash": """_finetune() {
    local line="${COMP_LINE:0:$COMP_POINT}" word="${COMP_WORDS[COMP_CWORD]}" found last
    last="${line##* }"
    mapfile -t COMPREPLY < <(finetune completion candidates -- "$line")
    # bash breaks words at = and :, and wants only what follows the break.
    found="${last%"${word#=}"}"
    [ -n "$found" ] && COMPREPLY=("${COMPREPLY[@]#"$found"}")
}
complete -o nospace -o default -F _finetune finetune""",
    "zsh": """#compdef finetune
_finetune() {
    local -a found
    found=("${(@f)$(finetune completion candidates -- "${(j: :)words[1,CURRENT]}")}")
    compadd -S '' -a found
}
compdef _finetune finetune""",
    "fish": "complete -c finetune -f -a '(finetune completion candidates -- (commandline -cp))'",
}
_INSTALL = {
    "bash": 'eval "$(finetune completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(finetune completion zsh)"   # in ~/.zshrc, after compinit',
    "fish": "finetune completion fish > ~/.config/fish/completions/finetune.fish",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = "to install:\n" + "\n".join(f"  {line}" for line in _INSTALL.values())
    actions = parser.add_subparsers(dest="action", metavar="SHELL", required=True)
    for shell in SCRIPTS:
        add_action(actions, shell, f"print the script for {shell}", epilog=f"to install:\n  {_INSTALL[shell]}")
    found = add_action(actions, "candidates", "print completions of a line (called by the scripts)")
    found.add_argument("line", metavar="LINE", help="the command line up to the cursor")


def run(args: argparse.Namespace) -> None:
    """Print a script or the candidates to standard output."""
    if args.action in SCRIPTS:
        log.result(SCRIPTS[args.action])
        return
    for candidate in candidates(args.line):
        log.result(candidate)


def candidates(line: str) -> list[str]:
    """List the whole words that could complete a command line.

    Args:
        line: from `finetune` up to the cursor; ends with a space if a new word begins.
    """
    from finetune.cli.main import COMMANDS

    words = [*line.split(), *([""] if line.endswith((" ", "\t")) else [])]
    current = words[-1]
    if len(words) <= 2:
        return [command for command in COMMANDS if command.startswith(current)]
    if words[1] not in COMMANDS:
        return []
    parser = _parser_of(words[1])
    given = words[2:-1]
    if (actions := actions_of(parser)) and not given:
        return [action for action in actions if action.startswith(current)]
    if actions and given[0] in actions:
        parser, given = actions[given[0]], given[1:]
    return sorted(word for word in _words(parser, given, current) if word.startswith(current))


def _parser_of(command: str) -> argparse.ArgumentParser:
    from finetune.cli.main import COMMANDS

    parser = Parser(prog=f"finetune {command}")
    import_module(COMMANDS[command][0]).add_arguments(parser)
    return parser


def _words(parser: argparse.ArgumentParser, given: list[str], current: str) -> Iterator[str]:
    """List what could follow: options, values of the preceding option, recipes or runs, then settings."""
    options_of = {name: action for action in parser._actions for name in action.option_strings}
    before = given[-1] if given else ""
    if before in options_of and options_of[before].metavar == "TARGET":
        from finetune.export.options import SUMMARIES

        yield from SUMMARIES
        return
    if before in options_of and options_of[before].nargs != 0:
        yield from map(str, options_of[before].choices or ())
        return
    if current.startswith("-"):
        yield from (name for name in options_of if name.startswith("--"))
        return
    takes = {action.metavar or action.dest for action in parser._actions if not action.option_strings}
    positionals = [word for word in given if not word.startswith("-")]
    if takes & {"RUN", "DIR"} and not positionals:
        yield from _runs()
    if "RECIPE" in takes:
        if not positionals:
            yield from list_recipes()
        else:
            yield from _settings(current)


def _runs() -> Iterator[str]:
    return (str(file.parent) for file in sorted(Path().glob("runs/*/config.yaml")))


def _settings(current: str) -> Iterator[str]:
    """List `group=option`, the next level of a dotted key, or the values of a key."""
    key, equals, _ = current.partition("=")
    if equals:
        if key in groups():
            yield from (f"{key}={option}" for option in options(key))
        yield from (f"{key}={value}" for value in _values(tuple(key.split("."))))
        return
    yield from (f"{group}=" for group in groups())
    above = tuple(key.split(".")[:-1])
    for name, kind in children(type_at(above)).items():
        yield ".".join((*above, name)) + ("." if takes_keys(kind) else "=")


def _values(path: tuple[str, ...]) -> Iterator[str]:
    kind = type_at(path)
    if kind is None:
        return
    parts = get_args(kind) if get_origin(kind) is types.UnionType else (kind,)
    if bool in parts:
        yield from ("true", "false")
    if types.NoneType in parts:
        yield "null"
    yield from allowed_words(kind)
