"""`--help` of every command and action: a sentence, every option explained, and examples that parse."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from finetune.cli.arguments import Parser, actions_of, add_action, add_examples, parse
from finetune.cli.main import COMMANDS, main
from finetune.config.compose import compose
from finetune.config.recipes import list_recipes
from finetune.config.validate import to_plain
from finetune.errors import ConfigError


def parser_of(command: str) -> tuple[Parser, argparse.ArgumentParser]:
    """The whole command line with one command's arguments, and that command's part."""
    whole = Parser(prog="finetune")
    subparser = whole.add_subparsers(dest="command", parser_class=Parser).add_parser(command)
    import_module(COMMANDS[command][0]).add_arguments(subparser)
    return whole, subparser


def examples(epilog: str | None) -> list[str]:
    return [line.strip() for line in (epilog or "").splitlines() if re.match("  .*finetune ", line)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_and_explains_every_option(command: str) -> None:
    _, top = parser_of(command)
    assert examples(top.epilog)
    for name, parser in {"": top, **actions_of(top)}.items():
        if name == "candidates":
            continue  # for the shells' scripts
        own = examples(parser.epilog)
        assert own and (not name or all(f"finetune {command}" in line for line in own)), (command, name)
        if name:
            assert parser.description and parser.description[0].isupper() and parser.description.endswith(".")
        for action in parser._actions:
            # Two lists of actions explain themselves by their own lines.
            explained = action.help or isinstance(action, argparse._SubParsersAction)
            assert explained, f"{command} {name}: {action.dest} has no help"
            wide = action.option_strings and action.nargs != 0 and action.metavar is None and action.choices is None
            assert not wide, f"{command} {name}: {action.dest} shows itself as its value"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_parse(command: str) -> None:
    for example in examples(parser_of(command)[1].epilog):
        if "finetune completion" in example:
            continue  # `eval "$(...)"` and its like are tests/cli/test_completion.py's
        words = shlex.split(re.split(r" [<>] ", example)[0], comments=True)[1:]
        whole, subparser = parser_of(words[0])
        args = parse(whole, words, subparser.format_usage())
        given = getattr(args, "words", [])
        if given and given[0] in list_recipes():
            compose(given[0], [word for word in given[1:] if "=" in word])


@pytest.mark.parametrize("command", ["recipes", "config", "estimate"])
def test_the_examples_of_commands_without_a_model_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each in a directory of its own, with the files that the examples name."""
    record = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    for number, example in enumerate(examples(parser_of(command)[1].epilog)):
        directory = tmp_path / str(number)
        directory.mkdir()
        monkeypatch.chdir(directory)
        (directory / "mine.jsonl").write_text("".join(f"{json.dumps(record | {'id': n})}\n" for n in range(40)))
        if "recipes new" not in example:
            assert main(["recipes", "new", "mine.yaml", "--from", "legal_20b"]) == 0
        for run in ("runs/first", "runs/second"):
            (directory / run).mkdir(parents=True)
            (directory / run / "config.yaml").write_text(json.dumps(to_plain(compose("legal_20b").config)))
        words = shlex.split(re.split(r" [<>] ", example)[0], comments=True)[1:]
        assert main(words) == 0, (example, capfd.readouterr().err)


def test_a_wrong_example_would_be_seen() -> None:
    whole, subparser = parser_of("estimate")
    with pytest.raises(ConfigError):
        parse(whole, ["estimate", "legal_20b", "--gpu", "24"], subparser.format_usage())


def test_an_action_shows_its_own_examples_only() -> None:
    parser = Parser(prog="finetune data")
    actions = parser.add_subparsers(dest="action")
    add_action(actions, "see", "see things")
    add_action(actions, "count", "count things")
    add_examples(parser, "finetune data see a", "finetune data count b")
    assert examples(parser.epilog) == ["finetune data see a", "finetune data count b"]
    assert examples(actions_of(parser)["count"].epilog) == ["finetune data count b"]
    assert actions_of(parser)["see"].description == "See things."


def test_help_of_an_action_is_printed_with_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recipes", "new", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "Write a recipe" in printed and "  finetune recipes new mine.yaml --data mine.jsonl " in printed
