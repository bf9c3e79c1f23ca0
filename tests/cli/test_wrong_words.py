"""Other tools' habits, and other things in a recipe's place: each is answered with the command that does it here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.config import derive
from finetune.config.compose import compose


def refusal(capfd: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    assert main([*map(str, words)]) == code
    return capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["-m", "trainer.learning_rate=1e-4,2e-4"], "--sweep key=a,b"),
        (["--multirun"], "--sweep key=a,b"),
        (["--cfg", "job"], "finetune config show RECIPE"),
        (["--config-name", "mine"], "give the recipe's name or path itself"),
        (["trainer.learning_rate=1e-4,2e-4"], "--sweep trainer.learning_rate=1e-4,2e-4"),
    ],
)
def test_hydras_own_words_name_what_does_it_here(
    words: list[str], answer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert answer in refusal(capfd, "train", "quickstart", *words)


def test_other_things_in_a_recipes_place_are_answered(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, adapter, base = (tmp_path / name for name in ("run", "adapter", "base"))
    for directory, name in ((run, "config.yaml"), (adapter, "adapter_config.json"), (base, "config.json")):
        directory.mkdir()
        (directory / name).write_text("{}")
    data = tmp_path / "my data.jsonl"
    data.write_text("{}\n")
    for word, answer in (
        (data, f"finetune recipes new mine.yaml --data '{data}'"),
        (tmp_path / "missing.parquet", "finetune recipes new mine.yaml --data"),
        (run, f"finetune train --resume {run}"),
        (adapter, f"finetune adapter show {adapter}"),
        (base, f"model.path={base}"),
        ("gpt-oss-120b", "finetune train legal_120b model.path=openai/gpt-oss-120b"),
        ("openai/gpt-oss-20b", "finetune train legal_20b model.path=openai/gpt-oss-20b"),
    ):
        for command in ("train", "estimate"):
            said = refusal(capfd, command, word)
            assert "not a recipe" in said and answer in said, (command, word)
    assert "there is no recipe called nothing" in refusal(capfd, "train", "nothing")


@pytest.mark.parametrize(
    ("override", "package"),
    [
        ("distributed=zero2", "deepspeed"),
        ("trainer.optimizer=adamw_8bit", "bitsandbytes"),
        ("logging.tracker=wandb", "wandb"),
    ],
)
def test_a_missing_package_stops_the_run_and_the_dry_run_at_once(
    override: str,
    package: str,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(derive.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    words = ["train", "quickstart", f"model.path={tiny_base}", f"output_dir={tmp_path}", override]
    words += ["distributed.num_processes=2"] if package == "deepspeed" else []
    for extra in ([], ["--dry-run"]):
        said = refusal(capfd, *words, *extra, code=5)
        assert f"needs {package}, which is not installed" in said and "pip install" in said
    assert list(tmp_path.iterdir()) == [], "no run directory, no logs"


def test_an_estimate_says_first_that_the_base_alone_is_too_large(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "legal_120b", "--gpu-gib", "24"]) == 4
    said = capfd.readouterr().out
    assert "the frozen weights alone take" in said.splitlines()[1] and "distributed=fsdp2" in said
    assert "the cheapest changes" not in said
    assert main(["estimate", "legal_20b", "--gpu-gib", "16"]) == 4
    said = capfd.readouterr().out
    assert "the frozen weights alone" not in said and "the cheapest changes" in said, "control: the base fits here"


def test_a_hub_name_is_asked_for_before_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = compose("quickstart", ["model.path=someone/nothing", f"data.cache_dir={tmp_path / 'tokens'}"]).config
    from finetune.train.session import open_session

    with pytest.raises(Exception, match="someone/nothing") as error:
        open_session(config)
    assert getattr(error.value, "exit_code", 1) in (2, 3, 5)
    assert "tokens" not in capfd.readouterr().err and not (tmp_path / "tokens").exists()


def test_a_resumed_run_keeps_its_wandb_id(tmp_path: Path) -> None:
    from finetune.config.schema import LoggingConfig
    from finetune.train.metrics import make_tracker

    config = LoggingConfig(tracker="wandb", mode="offline")
    first, second = (make_tracker(config, tmp_path).init_kwargs for _ in range(2))
    assert first["id"] == second["id"] and first["resume"] == "allow"
    other = tmp_path / "other"
    other.mkdir()
    assert make_tracker(config, other).init_kwargs["id"] != first["id"]


def test_a_list_of_one_and_a_models_name_are_answered(capfd: pytest.CaptureFixture[str]) -> None:
    assert "write a list: [q_proj]" in refusal(
        capfd, "config", "show", "quickstart", "adapter.attention.targets=q_proj"
    )
    assert "did you mean model.path?" in refusal(capfd, "config", "show", "quickstart", "model.name=x")
