"""The docs are true: their commands parse, the cheap ones run, their links lead somewhere, the notebooks run."""

from __future__ import annotations

import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.arguments import Parser, parse, recipe_and_overrides
from finetune.cli.main import COMMANDS, main
from finetune.config.compose import compose
from finetune.config.recipes import list_recipes
from finetune.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "bench" / "README.md", *(ROOT / "docs").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))
CHEAP = ("recipes", "config show", "config diff", "estimate", "completion bash", "data prepare")
"""Commands that answer at once and change nothing; `estimate` of the published bases needs no download."""


def commands(page: Path) -> list[str]:
    """Lines of code blocks that call the command, and calls in backticks that begin with it."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(call.split()) for call in re.findall(r"`(finetune [^`]+)`", prose)]
    return [line for line in [*lines, *inline] if line.startswith("finetune ")]


def words_of(command: str) -> list[str]:
    """The words after `finetune`; optional parts in brackets count as given, of `a|b` the first is taken."""
    plain = re.sub(r"[\[\]]", "", command) if re.search(r" \[-{0,2}\w", command) else command
    return [re.sub(r"^([\w-]+)\|.*", r"\1", word) for word in shlex.split(plain, comments=True)[1:]]


ALL = sorted({command for page in PAGES for command in commands(page)})


def parsed(words: list[str]) -> Any:
    parser = Parser(prog="finetune")
    subparsers = parser.add_subparsers(dest="command", parser_class=Parser)
    subparser = subparsers.add_parser(words[0])
    import_module(COMMANDS[words[0]][0]).add_arguments(subparser)
    return parse(parser, words, subparser.format_usage())


def is_whole(words: list[str]) -> bool:
    """Whether a call can be parsed: not only a command's name, nothing left out by dots."""
    return len(words) > 1 and not any("..." in word for word in words)


@pytest.mark.parametrize("command", ALL)
def test_every_command_parses(command: str) -> None:
    words = words_of(command)
    assert words[0] in COMMANDS, f"there is no finetune {words[0]}"
    if not is_whole(words):
        return
    try:
        args = parsed(words)
    except ConfigError as error:
        assert len(words) == 2 and "arguments are required" in str(error), error  # a mention, such as `adapter merge`
        return
    if hasattr(args, "words") and args.words and args.words[0] in list_recipes() and words[0] != "config":
        recipe, overrides = recipe_and_overrides(args)
        compose(recipe, [word for word in overrides if re.search(r"=(?![A-Z]{3,}$)", word)])  # KIND is the reader's


def test_a_wrong_command_does_not_parse() -> None:
    for wrong in ("train quickstart --dryrun", "data previw mine.yaml", "recipes list"):
        with pytest.raises(ConfigError):
            parsed(words_of(f"finetune {wrong}"))
    assert len(ALL) > 40


def is_cheap(command: str) -> bool:
    words = words_of(command)
    if not command.startswith(tuple(f"finetune {start}" for start in CHEAP)) or not is_whole(words):
        return False
    if (
        words[:2] == ["recipes", "new"]
        or words == ["config", "show"]
        or any(word in ("RECIPE", "RUN", "NAME") or ".yaml" in word for word in words)
    ):
        return False  # needs the reader's own file; tests/cli/test_recipes_new.py and others run those
    return "--from" not in words and not any(word.startswith("model=") for word in words)


@pytest.mark.parametrize("command", [command for command in ALL if is_cheap(command)])
def test_cheap_commands_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(words_of(command))
    out = capsys.readouterr()
    assert code == 0 or ("estimate" in command and code == 4 and "--gpu-gib" in command), out.err
    assert out.out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert "\n# %% [markdown]\n# # " in notebook.read_text()
    runpy.run_path(str(notebook))


def test_there_are_three_notebooks() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3"]
