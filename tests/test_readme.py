"""The README is true: its commands and files exist, and it says what was not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_can_be_read_in_minutes() -> None:
    assert len(README.splitlines()) <= 220
    first_screen = "\n".join(README.splitlines()[:20])
    assert "No GPU has run this yet" in first_screen or ("## Results" in README and "not measured" not in README)


def test_make_targets_and_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)) <= targets
    from finetune.cli.main import COMMANDS

    assert set(re.findall(r"^finetune ([a-z]+)", README, flags=re.MULTILINE)) <= set(COMMANDS)


def test_files_it_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_estimates_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in ("legal_20b", "legal_120b"):
        assert main(["estimate", recipe, "--json"]) == 0
        gib = json.loads(capsys.readouterr().out)["peak_bytes"] / 2**30
        (stated,) = re.findall(rf"^\| `{recipe}` \|[^|]*\| ([\d.]+) GiB estimated", README, flags=re.MULTILINE)
        assert stated == f"{gib:.1f}" and re.search(rf"`{recipe}`(?: takes)? {stated} GiB", README)
