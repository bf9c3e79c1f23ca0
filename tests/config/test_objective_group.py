"""The `objective` group: its class is chosen by `kind`, and a tagged union of several kinds names what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt
from pydantic import Discriminator, TypeAdapter

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.fields import Strict
from finetune.config.schema import RunConfig, SftConfig
from finetune.config.schema_paths import children, range_at, section_classes, section_tags, type_at
from finetune.config.validate import dump_yaml, load_run_config, parse, to_plain
from finetune.errors import ConfigError


def test_sft_is_the_objective_of_every_recipe_and_of_a_run_stored_without_one(tmp_path: Path) -> None:
    config = compose("quickstart").config
    assert config.objective == SftConfig()
    assert to_plain(config)["objective"] == {"kind": "sft"}
    stored = dump_yaml(config).replace("objective:\n  kind: sft\n", "")
    assert "objective" not in stored
    (tmp_path / "config.yaml").write_text(stored)
    assert load_run_config(tmp_path / "config.yaml") == config


def test_a_recipe_and_the_command_line_choose_it(tmp_path: Path) -> None:
    text = "defaults:\n  - override /model: tiny\n  - override /objective: {}\n"
    text += "data:\n  train: {{mine: {{path: x.jsonl}}}}\n"
    (tmp_path / "mine.yaml").write_text(text.format("sft"))
    assert compose(str(tmp_path / "mine.yaml"), ["objective=sft"]).config.objective.kind == "sft"
    (tmp_path / "mine.yaml").write_text(text.format("stf"))
    with pytest.raises(ConfigError, match=r"mine.yaml:3: the group objective has no option stf") as caught:
        compose(str(tmp_path / "mine.yaml"))
    assert caught.value.fix == "did you mean sft?"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.kind=sfft", "did you mean sft?"),
        ("objective.kind=null", "objective.kind is null, must be"),
        ("objective.bta=1", "objective.bta is not a key"),
        ("objective={kind: sft}", "does not choose a file"),
    ],
)
def test_a_wrong_key_or_kind_is_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("quickstart", [override])
    assert words in str(caught.value) and str(caught.value).startswith("command line: ")


@pytest.mark.parametrize("given", ["trainer.learning_rate=null", "seed=0"])
def test_without_a_learning_rate_the_objective_has_one_and_says_so(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["medical_20b", "model.path=openai/gpt-oss-20b"]
    overrides = [given, *(["trainer.learning_rate=null"] if given == "seed=0" else [])]
    assert compose("medical_20b", overrides).config.trainer.learning_rate == 2e-4
    assert main(["config", "show", *recipe[:1], *overrides]) == 0
    assert "learning_rate: 0.0002" in capsys.readouterr().out


@dataclass(frozen=True, kw_only=True)
class Plain(Strict):
    """One kind."""

    kind: Literal["plain"] = "plain"
    share: Annotated[float, Gt(0)] = 0.5


@dataclass(frozen=True, kw_only=True)
class Paired(Strict):
    """Another kind, with a key of its own."""

    kind: Literal["paired", "mirrored"] = "paired"
    share: int = 1
    beta: Annotated[float, Gt(0)] = 0.1


@dataclass(frozen=True, kw_only=True)
class Made(Strict):
    """A top section with a tagged union of two classes."""

    objective: Annotated[Plain | Paired, Discriminator("kind")] = field(default_factory=Plain)


def problem(objective: Any) -> str:
    """Errors of a made-up configuration."""
    _, (found,) = parse({"objective": objective}, Made)
    return f"{'.'.join(found.path)} {found.what}" + (f" ({found.fix})" if found.fix else "")


def test_paths_know_the_keys_of_every_kind() -> None:
    union = type_at(("objective",), Made)
    assert section_classes(union) == (Plain, Paired)
    assert section_tags(Paired) == ("paired", "mirrored")
    assert list(children(union)) == ["kind", "share", "beta"]
    assert children(union)["kind"] == Literal["plain", "paired", "mirrored"]
    assert type_at(("objective", "beta"), Made) is float
    assert range_at(("objective", "beta"), Made) == "above 0"
    assert type_at(("objective", "gamma"), Made) is None


def test_the_kind_decides_which_keys_are_right() -> None:
    assert parse({"objective": {"kind": "mirrored", "beta": 1}}, Made) == (
        Made(objective=Paired(kind="mirrored", beta=1.0)),
        [],
    )
    assert parse({}, Made) == (Made(), [])
    assert problem({"kind": "plain", "beta": 1}) == (
        "objective.beta is no key of objective.kind=plain (it belongs to paired or mirrored: choose objective=paired)"
    )
    assert problem({"kind": "paired", "gamma": 1}).startswith("objective.gamma is not a key (")
    assert problem({"kind": "paired", "beta": 0}) == "objective.beta is 0, must be above 0"
    assert problem({"kind": "paired", "beta": "x"}) == 'objective.beta is "x", must be a number'
    assert problem({"kind": "pared"}) == (
        'objective.kind is "pared", must be one of plain, paired, mirrored (did you mean paired?)'
    )
    assert problem({"beta": 1}) == "objective.kind is not set (it takes one of plain, paired, mirrored)"
    assert problem(3).startswith("objective is 3, must be a mapping with keys kind, share, beta")


def test_the_top_section_of_recipes_is_the_schemas() -> None:
    assert section_classes(RunConfig) == (RunConfig,)
    assert TypeAdapter(Made).validate_python({}) == Made()
