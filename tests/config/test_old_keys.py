"""Keys under their names of 0.1 in a recipe, an override and a stored run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.cli.main import main
from finetune.config import old_keys
from finetune.config.compose import compose
from finetune.config.old_keys import RENAMED, current_key
from finetune.config.schema_paths import dotted, type_at
from finetune.config.validate import dump_yaml, load_run_config, to_plain
from finetune.errors import ConfigError

OWN = "defaults:\n  - override /model: tiny\ndata:\n  train: {mine: {path: mine.jsonl}}\n"


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(old_keys, "_reported", set())


def recipe(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(OWN + text)
    return str(path)


def test_the_table_leads_from_keys_that_are_gone_to_keys_that_exist() -> None:
    for old in RENAMED:
        assert type_at(old) is None and type_at(current_key(old)) is not None, old


def test_a_recipe_with_old_keys_is_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = recipe(tmp_path, "trainer: {micro_steps: 3, warmup_share: 0.5}\nseed: ${trainer.micro_steps}\n")
    config = compose(old).config
    told = capsys.readouterr().err.splitlines()
    assert [line.partition("mine.yaml")[2] for line in told] == [
        ":5: trainer.micro_steps is now called trainer.gradient_accumulation_steps; 0.2 reads both names",
        ":5: trainer.warmup_share is now called trainer.warmup_ratio; 0.2 reads both names",
    ]
    new = recipe(tmp_path, "trainer: {gradient_accumulation_steps: 3, warmup_ratio: 0.5}\nseed: 3\n")
    assert compose(new).config == config
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("old", RENAMED, ids=dotted)
def test_every_old_key_works_as_an_override(old: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    value = "skip" if old[-1] == "on_bad_row" else 0.25 if type_at(current_key(old)) is float else 7
    config = compose("quickstart", [f"{dotted(old)}={value}"]).config
    assert to_plain(config)[old[0]][current_key(old)[1]] == value
    assert f"command line: {dotted(old)} is now called {dotted(current_key(old))};" in capsys.readouterr().err


def test_an_override_wins_over_the_recipe_whichever_names_they_use(tmp_path: Path) -> None:
    for in_recipe, typed in (
        ("micro_steps", "gradient_accumulation_steps"),
        ("gradient_accumulation_steps", "micro_steps"),
    ):
        path = recipe(tmp_path, f"trainer: {{{in_recipe}: 3}}\n")
        assert compose(path, [f"trainer.{typed}=5"]).config.trainer.gradient_accumulation_steps == 5


def test_both_names_at_once_are_refused(tmp_path: Path) -> None:
    both = recipe(tmp_path, "trainer:\n  micro_steps: 3\n  gradient_accumulation_steps: 3\n")
    with pytest.raises(
        ConfigError, match=r"mine.yaml:6: trainer.micro_steps is the old name of .*, which .*mine.yaml:7"
    ):
        compose(both)
    with pytest.raises(ConfigError, match=r"fix: keep trainer\.gradient_accumulation_steps"):
        compose("quickstart", ["trainer.micro_steps=2", "trainer.gradient_accumulation_steps=2"])


def test_a_stored_run_of_0_1_reads_as_it_was_and_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("quickstart", ["trainer.gradient_accumulation_steps=3"]).config
    stored = yaml.safe_load(dump_yaml(config))
    del stored["objective"]
    for (section, old), new in RENAMED.items():
        stored[section][old] = stored[section].pop(new)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    assert load_run_config(tmp_path / "config.yaml") == config
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "was written by version 0.1: 13 keys are read under new names, such as data.on_bad_row as data.on_bad_record"
    )
    assert load_run_config(tmp_path / "config.yaml") == config
    assert capsys.readouterr().err == ""
    assert main(["config", "diff", "quickstart", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "trainer.gradient_accumulation_steps: 1 -> 3\n"
