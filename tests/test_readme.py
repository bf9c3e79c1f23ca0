"""The README is true: its tree names every module, and its commands exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tree_is_todays() -> None:
    with_tree = runpy.run_path(str(ROOT / "scripts" / "readme_tree.py"))["with_tree"]
    assert with_tree(README) == README, "run: python scripts/readme_tree.py --write"


def test_make_targets_and_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)) <= targets
    from finetune.cli.main import COMMANDS

    assert set(re.findall(r"^finetune ([a-z]+)", README, flags=re.MULTILINE)) <= set(COMMANDS)


def test_files_it_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
