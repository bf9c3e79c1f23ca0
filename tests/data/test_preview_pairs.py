"""Preview, counts and new recipes of preference files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.cli.new_recipe import recipe_text
from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.dataset import load_split
from finetune.data.inspect_file import inspect_file
from finetune.data.pair_stats import pair_lines, pair_stats
from finetune.data.preview_pairs import group_as_json, group_as_text, groups_as_html, groups_of
from finetune.errors import InputError
from finetune.files import JsonObject

PAIR = {"id": "a", "prompt": "What is <|end|> 2 + 2?", "chosen": "Four.", "rejected": "It is five, of course."}
RANKED = {"id": "b", "prompt": "Rank?", "completions": ["one", "two", "three"], "scores": [2, 2, 5]}


def written(directory: Path, records: list[JsonObject]) -> str:
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def data_of(path: str) -> DataConfig:
    return DataConfig(
        train={"mine": SourceConfig(path=path)}, cache=False, pairs="all", on_bad_record="skip", max_skipped_ratio=1
    )


def test_a_pair_is_shown_with_its_prompt_once_and_its_answers_side_by_side(tmp_path: Path) -> None:
    split = load_split(data_of(written(tmp_path, [PAIR, RANKED])), "train")
    pair, ranked = groups_of(split.examples, split.first_examples())
    text = group_as_text(pair, colour=False, width=60)
    assert text.count("What is <\\|end|> 2 + 2?") == 1 and "shared by all answers" in text
    block = [line for line in text.splitlines() if " | " in line]
    assert block[0].startswith("--- chosen") and "--- rejected" in block[0]
    left, right = ("".join(line.split(" | ")[side].strip() for line in block[1:] if " | " in line) for side in (0, 1))
    assert "Four." in left and "Four." not in right and "five" in right.replace("\n", "")
    assert "answer 2 of 3, score 2" in group_as_text(ranked, colour=False, width=100)


def test_colours_change_nothing_but_codes(tmp_path: Path) -> None:
    split = load_split(data_of(written(tmp_path, [PAIR])), "train")
    (pair,) = groups_of(split.examples, split.first_examples())
    coloured = re.sub(r"\x1b\[[\d;]*m", "", group_as_text(pair, colour=True, width=400))
    assert "\x1b[32" in group_as_text(pair, colour=True, width=400)
    assert "<|channel|>final<|message|>Four.<|return|>" in coloured


def test_page_and_json_have_all_answers_and_no_markup_of_the_data(tmp_path: Path) -> None:
    split = load_split(data_of(written(tmp_path, [PAIR | {"chosen": "<b>Four</b>"}])), "train")
    (pair,) = groups_of(split.examples, split.first_examples())
    page, document = groups_as_html("title", [pair]), group_as_json(pair)
    assert "&lt;b&gt;Four" in page and "<b>Four" not in page and "script" not in page.replace("no script", "")
    assert [answer["score"] for answer in document["answers"]] == [1.0, 0.0] and document["id"] == "a"
    shared = sum(piece["num_tokens"] for piece in document["prompt"])
    assert shared == document["shared_tokens"] == pair[0].shared


def test_counts_of_pairs_ties_margin_and_what_sharing_saves(tmp_path: Path) -> None:
    same = {"prompt": "x", "chosen": "a", "rejected": " a"}
    split = load_split(data_of(written(tmp_path, [PAIR, RANKED, same])), "train")
    found, lengths = pair_stats(split.examples, split.first_examples(), split.stats)
    assert (found.records, found.answers, found.pairs, found.ties, found.identical) == (2, 5, 3, 1, 1)
    assert found.tokens_separate == split.stats.num_tokens and found.tokens_shared == sum(lengths)
    assert 0 < found.saved < 1 and found.length_margin < 0 and found.shorter_wins > 0.5
    text = "\n".join(pair_lines(found))
    assert "3 of 5 answers; 1 ties; 1 records left out for identical answers" in text and "saved)" in text


def test_commands_show_count_and_refuse_pairs(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, [PAIR, RANKED])
    settings = [
        "quickstart",
        "data=own",
        f"data.train.mine.path={path}",
        "data.cache=false",
        "evaluate.test_examples=null",
    ]
    settings += ["evaluate.every_steps=null", "evaluate.validation_examples=null"]
    assert main(["data", "preview", *settings, "-n", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert main(["data", "stats", *settings, "--json"]) == 0
    train = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert train["preferences"]["pairs"] == 2 and train["packing"]["samples"] == 2
    assert main(["train", *settings, f"model.path={tiny_base}", "--dry-run"]) == 2
    assert "preference_20b" in capsys.readouterr().err


def test_a_new_recipe_has_the_objective_of_the_files_form(tmp_path: Path) -> None:
    for records, objective in (
        ([PAIR], "dpo"),
        ([RANKED], "dpo"),
    ):
        path = written(tmp_path, records)
        summary = inspect_file(path)
        text = recipe_text("mine", path, summary, "tiny")
        assert f"- override /objective: {objective}" in text and "learning_rate: null" in text
        assert "validation_loss" not in text
    labelled = inspect_file(written(tmp_path, [{"prompt": "a", "completion": "b", "label": True}]))
    with pytest.raises(InputError, match="single answers with labels"):
        recipe_text("mine", path, labelled, "tiny")
    path = written(tmp_path, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    text = recipe_text("mine", path, inspect_file(path), "tiny")
    assert "objective" not in text and "learning_rate: 2.0e-4" in text
