"""Mistakes of new users: suggested names, errors before anything slow, and no useless lines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.config.suggest import looks_like_directory, suggest_base, suggest_path, suggest_run
from finetune.model.nf4 import without_kernel_advice


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, its data, a run and a directory that has a base's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /data: own\n"
        "data:\n  train:\n    mine: {path: mine.jsonl}\n"
    )
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("")
    (tmp_path / "base" / "tiny2").mkdir(parents=True)
    (tmp_path / "base" / "tiny2" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("train mine.yml --dry-run", 2, "did you mean mine.yaml?"),
        ("train mine.yaml", 3, "make it: finetune base tiny ./base/tiny"),
        ("train mine.yaml model.path=base/tiny3", 3, "did you mean base/tiny2?"),
        ("train mine.yaml model.path=base/tiny2 data.train.mine.path=mine.json", 3, "did you mean mine.jsonl?"),
        ("train mine.yaml --epochs 3", 2, "settings are written without dashes: trainer.epochs=VALUE"),
        ("train mine.yaml --learning-rate=3", 2, "trainer.learning_rate=3"),
        ("generate runs/frist hello", 3, "did you mean runs/first?"),
        ("chat runs/frist", 3, "did you mean runs/first?"),
        ("evaluate runs/frist", 3, "did you mean runs/first?"),
        ("export runs/frist --to peft", 3, "did you mean runs/first?"),
        ("report runs/frist", 3, "did you mean runs/first?"),
        ("adapter show runs/frist", 3, "did you mean runs/first?"),
        ("train --resume runs/frist", 3, "did you mean"),
        ("generate runs hello", 3, "runs in runs: first"),
        ("config", 2, "one of show, diff, schema"),
        ("config shw", 2, "did you mean show?"),
        ("export", 2, "such as `finetune export runs/first --to peft`"),
        ("recipes new other.yaml --from legal_20b --model tiny", 2, "--model goes with --data"),
    ],
)  # fmt: skip
def test_a_typing_mistake_gets_a_suggestion(
    here: Path, words: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == code
    assert said in capsys.readouterr().err


def test_missing_inputs_are_reported_before_anything_is_loaded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mine.yaml"]) == 3
    assert capsys.readouterr().err.startswith("error: model.path: there is no directory ./base/tiny")


def test_a_misspelt_form_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.jsonl").write_text('{"mesages": []}\n')
    assert main(["data", "stats", "mine.yaml"]) == 0
    assert "did you mean messages?" in capsys.readouterr().out


def test_a_record_without_an_id_is_named_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", "mine.yaml", "-n", "1"]) == 0
    assert "mine.jsonl:1: " in capsys.readouterr().out


def test_a_dry_run_shows_what_the_recipe_sets(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = ["model.path=openai/gpt-oss-20b", "trainer.epochs=2"]
    assert main(["train", "mine.yaml", "--dry-run", *hub]) == 0
    printed = capsys.readouterr().out
    assert "`finetune config show mine.yaml` prints every key" in printed
    assert "  trainer.epochs: 2.0  (default: 1.0)\n" in printed
    assert "adam_beta1" not in printed


def test_hub_names_are_no_directories(here: Path) -> None:
    assert not looks_like_directory("openai/gpt-oss-20b") and not looks_like_directory("someone/gpt-oss-mine")
    assert looks_like_directory("./base/tiny") and looks_like_directory("base/tinny") and looks_like_directory("/a/b/c")
    assert "openai/gpt-oss-20b" in suggest_base("gpt-oss-20") and "finetune base tiny" in suggest_base(
        "nothing/like/it"
    )


def test_no_suggestion_without_a_similar_name(here: Path) -> None:
    assert suggest_path(Path("zzz"), [here / "mine.yaml"]) is None
    assert suggest_run(here / "nowhere" / "x") is None
    assert suggest_run(here / "runs") == f"runs in {here / 'runs'}: first"


def test_only_the_line_about_a_hub_kernel_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    without_kernel_advice()
    without_kernel_advice()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please ...", "no kernels")
    logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]
