"""`finetune config diff` and `config schema`, against jsonschema and the settings of recipes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.json_schema import recipe_schema
from finetune.config.recipes import list_recipes
from finetune.config.schema_paths import children
from finetune.config.validate import dump_yaml


def diff(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, tuple[object, object]]:
    assert main(["config", "diff", *arguments, "--json"]) == 0
    return {found["key"]: (found["before"], found["after"]) for found in json.loads(capsys.readouterr().out)}


def test_differences_from_the_defaults_are_what_a_recipe_sets(capsys: pytest.CaptureFixture[str]) -> None:
    found = diff(capsys, "quickstart", "trainer.weight_decay=0.5")
    assert found["trainer.weight_decay"] == (0.0, 0.5)
    assert found["data.train.cuad.path"][0] == "(absent)"
    assert found["data.train.cuad.where.split"] == ("(absent)", "train")
    assert "data.train.cuad.weight" not in found and "seed" not in found


def test_two_recipes_and_a_run_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = diff(capsys, "legal_20b", "legal_120b")
    assert found["model.path"] == ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
    (tmp_path / "config.yaml").write_text(dump_yaml(compose("quickstart", ["seed=7"]).config))
    assert diff(capsys, "quickstart", str(tmp_path)) == {"seed": (0, 7)}
    assert diff(capsys, "quickstart", "quickstart") == {}
    assert main(["config", "diff", str(tmp_path), "seed=3"]) == 2


def test_every_recipe_fits_the_schema_and_a_wrong_key_does_not() -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    for path in list_recipes().values():
        assert list(validator.iter_errors(yaml.safe_load(path.read_text()))) == []
    for wrong in (
        {"trainer": {"epoch": 1}},
        {"trainer": {"epochs": "two"}},
        {"defaults": [{"override /model": "big"}]},
    ):
        assert list(validator.iter_errors(wrong)), wrong


def test_every_key_is_documented() -> None:
    schema = recipe_schema()
    for name, section in schema["$defs"].items():
        for key, value in section["properties"].items():
            is_section = "$ref" in value or name == "RunConfig"
            assert value["description"] or is_section, f"{name}.{key} is documented nowhere"
    assert set(schema["properties"]) == {*children(compose("quickstart").config.__class__), "defaults"}
