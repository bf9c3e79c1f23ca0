"""Composing and checking configurations: mistakes are named with their place and a fix."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.layers import read_yaml
from finetune.config.paths import resolve_data_path, shipped_dir
from finetune.config.recipes import groups, list_recipes, option_file, options
from finetune.config.schema import (
    AdapterConfig,
    DistributedConfig,
    EvaluateConfig,
    ExportConfig,
    LoggingConfig,
    RunConfig,
    SaveConfig,
    SftConfig,
    TrainerConfig,
)
from finetune.config.validate import dump_yaml, load_run_config, to_plain, validate
from finetune.errors import ConfigError, InputError

ALL_YAML = sorted([*shipped_dir("configs").rglob("*.yaml"), *shipped_dir("recipes").rglob("*.yaml")])
OWN = "defaults:\n  - override /model: tiny\ndata:\n  train: {mine: {path: mine.jsonl}}\n"


RECORDS = {
    "preference": "8,452",
    "legal": "4,369",
    "quickstart": "4,369",
    "medical": "437",
    "creative": "2,020",
    "one_batch": "7",
    "": "400",
}
NO_EVALUATION = [f"evaluate.{key}=null" for key in ("every_steps", "validation_examples", "test_examples")]


def refused(recipe: str | Path, *overrides: str) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        compose(str(recipe), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def own_recipe(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_composes_and_dry_runs(recipe, tmp_path, capsys):
    composed = compose(recipe)
    assert composed.recipe_name == recipe
    size = "120b" if "120b" in recipe else "20b"
    shutil.copy(shipped_dir("data") / "tokenizer" / f"gpt-oss-{size}" / "config.json", tmp_path)
    assert main(["train", recipe, "--dry-run", f"model.path={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert ("36 layers x 128 experts" if size == "120b" else "24 layers x 32 experts") in printed
    records = next(count for word, count in RECORDS.items() if word in recipe)
    assert f"train: {records} examples" in printed
    trainer, data = composed.config.trainer, composed.config.data
    tokens = trainer.micro_batch_size * trainer.gradient_accumulation_steps * data.max_length
    assert f"at most {tokens:,}" in printed
    assert all(f"data.train.{name}: " in printed for name in composed.config.data.train)


@pytest.mark.parametrize("group", groups())
def test_every_option_of_every_group_composes(group):
    for option in options(group):
        needs = ["data.train.mine.path=mine.jsonl", *NO_EVALUATION] if option == "own" else []
        compose("quickstart", [f"{group}={option}", *needs])


def test_own_recipe_anywhere_with_a_shipped_group(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_recipe(tmp_path, OWN.replace("tiny", "gpt_oss_120b") + "trainer: {learning_rate: 1e-3}\n")
    composed = compose("mine.yaml")
    assert composed.config.model.path == "openai/gpt-oss-120b"
    assert composed.config.trainer.learning_rate == 0.001  # PyYAML alone reads 1e-3 as text
    assert composed.recipe_name == "mine"


def test_a_key_and_a_key_below_it_are_refused(tmp_path):
    recipe = own_recipe(tmp_path, OWN)
    for overrides in (["name=", "name.name="], ["adapter.experts=3", "adapter.experts.rank=2"]):
        with pytest.raises(ConfigError, match="another override sets"):
            compose(str(recipe), overrides)


def test_command_line_wins_over_recipe_and_group_choice_over_both(tmp_path):
    recipe = own_recipe(tmp_path, OWN + "trainer: {epochs: 3}\nadapter: {experts: {rank: 2}}\n")
    config = compose(
        str(recipe), ["trainer.epochs=5", "model=gpt_oss_20b", "+seed=7", "++adapter.dtype=float32"]
    ).config
    assert (config.trainer.epochs, config.model.path, config.seed) == (5.0, "openai/gpt-oss-20b", 7)
    assert config.adapter.experts.rank == 2


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("trainer.learning_rat", "trainer.learning_rate"),
        ("trainr.learning_rate", "trainer"),
        ("learning_rate", "trainer.learning_rate"),
        ("trainer.max_length", "data.max_length"),
        ("data.train.cuad.pth", "data.train.cuad.path"),
        ("adapter.expert.rank", "adapter.experts"),
        ("hydra.run.dir", None),
        ("recipe", None),
    ],
)
def test_unknown_key_on_the_command_line(prefix, key, meant):
    message = refused("quickstart", f"{prefix}{key}=3")
    assert message.startswith("command line: ")
    assert meant is None or f"did you mean {meant}?" in message
    assert "hydra" not in message.lower().replace("hydra is not a key", "")


@pytest.mark.parametrize(
    ("lines", "place", "words"),
    [
        ("trainer:\n  learning_rat: 1\n", ":6", "did you mean trainer.learning_rate?"),
        ("trainr:\n  epochs: 1\n", ":5", "did you mean trainer?"),
        ("hydra:\n  run: {dir: x}\n", ":5", "hydra is not a key"),
        ("trainer:\n  gradient_accumulation_steps: many\n", ":6", 'is "many", must be a whole number'),
        ("trainer:\n  schedule: cosin\n", ":6", "did you mean cosine?"),
        ("trainer:\n", ":5", "is null, must be a mapping"),
        ("model: gpt_oss_20b\n", ":5", "override /model: gpt_oss_20b"),
        ("seed: 1\nseed: 2\n", ":6", "set twice"),
        ("seed: [1\n", ":6", "not valid YAML"),
        ("seed: !!python/object/apply:os.system [ls]\n", ":5", "tag"),
        ("seed: &a 1\nname: *a\n", ":6", "alias"),
        ("trainer: {_target_: os.system}\n", ":5", "names code"),
        ("name: ${oc.env:HOME}\n", ":5", "write the value itself"),
        ("name: ${${output_dir}:HOME}\n", ":5", "write the value itself"),
        ("name: ${nowhere}\n", ":5", "not found"),
        ("name: ???\n", ":5", "is no value"),
    ],
)
def test_mistake_in_a_recipe_names_file_and_line(tmp_path, lines, place, words):
    recipe = own_recipe(tmp_path, OWN + lines)
    message = refused(recipe)
    assert f"mine.yaml{place}" in message
    assert words in message


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("override /modle: tiny", "did you mean model?"),
        ("override /model: tinny", "did you mean tiny?"),
        ("model: tiny", "override /GROUP"),
        ("quickstart", "override /GROUP"),
        ("override /model: ${oc.env:X}", "has no option"),
    ],
)
def test_mistake_in_a_recipes_defaults(tmp_path, entry, words):
    message = refused(own_recipe(tmp_path, f"defaults:\n  - {entry}\nseed: 1\n"))
    assert "mine.yaml:2" in message
    assert words in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=gpt_oss_20", "did you mean gpt_oss_20b?"),
        ("+model=tiny", "does not choose a file"),
        ("model@data=tiny", "does not choose a file"),
        ("seed@data=1", "package"),
        ("trainer={epochs: 1}", "does not choose a file"),
        ("~seed", "deletes"),
        ("seed=1,2", "several values"),
        ("seed=[1", "cannot be read"),
        ("seed", "cannot be read"),
        ("name=${oc.env:HOME}", "write the value itself"),
        ("data.train._target_=x", "names code"),
        ("trainer.epochs.x=1", 'is {"x": 1}, must be a number'),
        ("name=???", "is no value"),
        ("name=12", "in quotes"),
        ("model.path=null", "must be text"),
        ("adapter.attention.targets=[q_poj]", "did you mean q_proj?"),
        ("data.validation={}", "keeps cuad"),
        ("data.train={mine: {path: x}}", "keeps cuad"),
    ],
)
def test_override_that_cannot_be_used(override, words):
    message = refused("quickstart", override)
    assert message.startswith("command line: ")
    assert words in message


RULES = [
    ("trainer.gradient_accumulation_steps=0", "at least 1"),
    ("trainer.learning_rate=0", "above 0"),
    ("trainer.learning_rate=nan", "above 0"),
    ("trainer.epochs=inf", "above 0"),
    ("trainer.warmup_ratio=1.5", "between 0 and 1"),
    ("trainer.adam_beta2=1.0", "below 1"),
    ("evaluate.confidence=1.0", "below 1"),
    ("adapter.attention.rank=-1", "0 or more"),
    ("adapter.experts.alpha=0", "above 0"),
    ("adapter.attention.targets=[]", "is empty"),
    ("adapter.attention.targets=[q_proj,q_proj]", "twice"),
    ("data.max_length=0", "at least 1"),
    ("data.conversation_date=20250628", "put it in quotes"),
    ("data.conversation_date=2025-6-28", "must be a date"),
    ("data.conversation_date=2025-02-30", "must be a date"),
    ("data.train.cuad.limit=0", "at least 1"),
    ("data.test.cuad.where.split=train", "trains on"),
    ("trainer.router_balance_coefficient=0.9", "pre-training value"),
    ("distributed.num_processes=2", "one process"),
    ("logging.mode=online", "no tracker"),
    ("trainer.early_stop_patience=2", "no metric"),
    ("name=a/b", "slash"),
    ("seed=-1", "between 0"),
]


@pytest.mark.parametrize(("override", "words"), RULES)
def test_rule_names_the_key_and_the_place(override, words):
    message = refused("quickstart", override)
    assert message.startswith(f"command line: {override.split('=')[0].rsplit('.where', 1)[0]} ")
    assert words in message


def test_rules_over_several_keys(tmp_path):
    both_off = refused("quickstart", "adapter.attention.rank=0", "adapter.experts.rank=0")
    assert "trains nothing" in both_off
    assert "evaluate.every_steps" in refused(
        "quickstart", "save.best_metric=validation_loss", "evaluate.every_steps=null"
    )
    assert "names no source" in refused(own_recipe(tmp_path, OWN + "evaluate: {every_steps: 5}\n"))
    assert "data.train names no source" in refused(own_recipe(tmp_path, "data: {train: {}}\n"))
    assert "data.train is not set" in refused(own_recipe(tmp_path, "seed: 1\n"))


def test_forced_balance_coefficient_is_let_through():
    forced = ["trainer.router_balance_coefficient=0.9", "trainer.force_router_balance_coefficient=true"]
    assert compose("quickstart", forced).config.trainer.router_balance_coefficient == 0.9


def test_all_problems_are_named_at_once():
    message = refused("quickstart", "trainer.epochs=0", "seed=-1")
    assert message.startswith("2 keys")
    assert "trainer.epochs" in message and "seed" in message


def test_written_configuration_reads_back_equal(tmp_path):
    config = compose("legal_20b", ["trainer.learning_rate=1e-8", "name='null'"]).config
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_run_config(path) == config
    assert validate(to_plain(config)) == config
    assert yaml.safe_load(path.read_text())["name"] == "null"
    path.write_text(dump_yaml(config).replace("gradient_accumulation_steps", "micro_stps"))
    with pytest.raises(ConfigError, match=r"config.yaml:\d+: trainer\.\w*micro_stps"):
        load_run_config(path)
    with pytest.raises(InputError):
        load_run_config(tmp_path / "none.yaml")


def test_default_options_hold_the_schemas_defaults(tmp_path):
    """One truth: a knob's documented value in configs/ is the one that the schema uses when no file sets it."""
    defaults = {
        ("adapter", "attention_and_experts"): AdapterConfig(),
        ("objective", "sft"): SftConfig(),
        ("trainer", "default"): TrainerConfig(),
        ("distributed", "single"): DistributedConfig(),
        ("logging", "none"): LoggingConfig(),
        ("evaluate", "default"): EvaluateConfig(),
        ("save", "default"): SaveConfig(),
        ("export", "default"): ExportConfig(),
    }
    # A recipe that sets nothing of these groups shows what their files say.
    plain = to_plain(compose(str(own_recipe(tmp_path, OWN))).config)
    plain["trainer"]["learning_rate"] = None  # the objective's default took its place
    for (group, option), expected in defaults.items():
        written = read_yaml(option_file(group, option)).data
        assert set(written) == set(plain[group]), f"{group} leaves keys undocumented"
        assert plain[group] == json.loads(json.dumps(dataclasses.asdict(expected))), group
    assert read_yaml(option_file("trainer", "default")).data["learning_rate"] is None


@pytest.mark.parametrize("path", ALL_YAML, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_knob_has_a_comment(path):
    in_defaults = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert len(line) <= 120, f"{path}:{number} is {len(line)} characters wide"
        in_defaults = line.startswith("defaults:") or (in_defaults and line.startswith(" "))
        if not in_defaults and re.match(r"\s*\w+:\s+[^#\s]", line):
            assert " # " in line, f"{path}:{number} sets a knob and does not say what it moves"


def test_recipes_start_with_hydras_package_line():
    for path in list_recipes().values():
        assert path.read_text().startswith("# @package _global_\n# "), path


def test_shipped_paths(tmp_path, monkeypatch):
    assert resolve_data_path("shipped://legal/x.jsonl") == shipped_dir("data") / "legal" / "x.jsonl"
    monkeypatch.chdir(tmp_path)
    assert resolve_data_path("a/b.jsonl") == Path("a/b.jsonl")
    with pytest.raises(InputError):
        resolve_data_path("shipped://../pyproject.toml")


def test_config_show_prints_every_key(capsys):
    assert main(["config", "show", "legal_120b", "--json", "seed=3"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["seed"] == 3
    assert set(shown) == set(RunConfig.__dataclass_fields__)
