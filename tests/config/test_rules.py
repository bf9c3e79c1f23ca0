"""Settings of `data` that contradict each other or have no effect are refused with the key's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.compose import compose
from finetune.errors import ConfigError

RECIPE = "# @package _global_\ndefaults:\n  - override /model: tiny\ndata:\n  train: {mine: {path: parts/*.jsonl}}\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("parts").mkdir()
    for name in "ab":
        Path(f"parts/{name}.jsonl").write_text("{}\n")
    Path("mine.yaml").write_text(RECIPE)
    return "mine.yaml"


def refused(recipe: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("data.train.mine.weight=0", "data.train.mine.weight", "above 0"),
        ("data.mix_temperature=0", "data.mix_temperature", "above 0"),
        ("data.train.mine.subset=en", "data.train.mine.subset", "has no effect"),
        ("data.train.mine.revision=main", "data.train.mine.revision", "has no effect"),
        ("data.train.mine.streaming=true", "data.train.mine.streaming", "has no effect"),
        ("data.validation_split.share=0", "data.validation_split.share", "above 0 and below 1"),
        ("data.too_long=cut", "data.too_long", "error, drop, truncate"),
        ("data.validation_split.kye=x", "data.validation_split", "did you mean data.validation_split.key?"),
        ("evaluate.every_steps=5", "evaluate.every_steps", "names no source"),
    ],
)
def test_a_setting_of_a_source_or_split(recipe: str, override: str, key: str, words: str) -> None:
    message = refused(recipe, override)
    assert key in message and words in message


def test_two_settings_of_sources(recipe: str) -> None:
    Path("v.jsonl").write_text("{}\n")
    message = refused(recipe, "data.validation.held.path=v.jsonl", "data.validation.held.weight=2")
    assert "data.validation.held.weight" in message and "has no effect" in message
    message = refused(recipe, "data.validation.held.path=v.jsonl", "data.validation_split.key=x")
    assert "data.validation_split" in message and "keep one of the two" in message


def test_a_test_file_that_a_training_glob_matches(recipe: str) -> None:
    assert "reads records that data.train.mine trains on" in refused(recipe, "data.test.held.path=parts/b.jsonl")
    assert compose(recipe, ["data.test.held.path=parts/c.jsonl"]).config.data.test


def test_a_validation_split_allows_evaluation(recipe: str) -> None:
    overrides = ["data.validation_split.key=x", "evaluate.every_steps=5", "save.best_metric=validation_loss"]
    assert compose(recipe, overrides).config.evaluate.every_steps == 5


def test_other_splits_of_one_saved_dataset_do_not_overlap(recipe: str) -> None:
    one = ["data.train.mine.path=saved", "data.train.mine.split=train", "data.test.held.path=saved"]
    assert compose(recipe, [*one, "data.test.held.split=test"]).config.data.test
    assert "trains on" in refused(recipe, *one, "data.test.held.split=train")
    assert "trains on" in refused(recipe, *one)


RENDERING = [
    (["data.loss.final=-1"], "data.loss.final is -1, must be 0 or more"),
    (["data.loss.analysis=nan"], "data.loss.analysis is nan"),
    ([f"data.loss.{name}=0" for name in ("analysis", "commentary", "tool_call", "final")], "every weight is 0"),
    (["data.loss.user=1"], "data.loss.user is not a key"),
    (["data.loss.tool_cal=1"], "did you mean data.loss.tool_call?"),
    (["data.earlier_thinking=split", "data.loss.turns=last"], "makes an example of every turn"),
    (["data.convention=template", "data.earlier_thinking=keep"], "the template always drops earlier thinking"),
    (["data.convention=template", "data.tool_call_type=constrain"], "the template writes json"),
    (["data.convention=jinja"], "data.convention"),
    (["data.model_identity=''"], "data.model_identity is empty"),
    (["data.train.cuad.form=chatml"], "data.train.cuad.form"),
]


@pytest.mark.parametrize(("overrides", "words"), RENDERING)
def test_rendering_settings_that_contradict_each_other(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("quickstart", overrides)
    assert words in str(caught.value)


def test_rendering_settings_that_fit_together() -> None:
    """Negative control: each setting alone, and those that fit together."""
    for overrides in (
        ["data.earlier_thinking=split", "data.loss.turns=all"],
        ["data.earlier_thinking=keep", "data.loss.turns=last"],
        ["data.convention=template", "data.earlier_thinking=split", "data.tool_call_type=json"],
        ["data.loss.analysis=0", "data.loss.final=2"],
    ):
        compose("quickstart", overrides)


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_zero_would_move_an_embedding_on_the_host(kind: str) -> None:
    overrides = ["model.embedding_on_cpu=true", f"distributed={kind}"]
    with pytest.raises(ConfigError, match=r"model\.embedding_on_cpu.*DeepSpeed moves the whole model"):
        compose("legal_20b", [*overrides, "distributed.num_processes=2"])
    assert compose("legal_20b", ["model.embedding_on_cpu=true", "distributed=ddp", "distributed.num_processes=2"])
