"""The shipped pairs: balanced answers, splits without a common document, and the committed command that makes them."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from finetune.config.paths import fix_for_missing_data, shipped_dir
from finetune.files import JsonObject

DATA = shipped_dir("data")
DOCUMENT = {
    "legal/cuad_pairs.jsonl.gz": ("contract",),
    "medical/pubmedqa_pairs.jsonl.gz": ("pmid",),
    "creative/fiction_pairs.jsonl.gz": ("work", "chapter"),
}


def read(name: str) -> list[JsonObject]:
    return [json.loads(line) for line in gzip.open(DATA / name, "rt", encoding="utf-8")]


def builder() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "build_pairs.py"
    spec = importlib.util.spec_from_file_location("build_pairs", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", DOCUMENT)
def test_in_each_split_every_answer_is_chosen_as_often_as_rejected(name: str) -> None:
    pairs = read(name)
    for split in ("train", "val", "test"):
        chosen, rejected = (
            Counter(pair[key] for pair in pairs if pair["split"] == split) for key in ("chosen", "rejected")
        )
        assert chosen == rejected and chosen
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


@pytest.mark.parametrize("name", DOCUMENT)
def test_no_document_and_no_prompt_is_in_two_splits(name: str) -> None:
    splits: dict[str, set[str]] = {}
    for pair in read(name):
        document = "|".join(pair[key] for key in DOCUMENT[name])
        for key in (json.dumps(pair["prompt"]), document):
            splits.setdefault(key, set()).add(pair["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_the_committed_command_makes_the_shipped_pairs() -> None:
    build = builder()
    name = "medical/pubmedqa_pairs.jsonl.gz"
    records = build.read_records(DATA / build.SOURCES[name])
    made = [
        pair
        for split in build.SPLITS
        for pair in build.medical_pairs([record for record in records if record["split"] == split], records)
    ]
    assert made == read(name)


def test_confusable_types_are_partners_and_each_clause_is_used_once() -> None:
    pairs = read("legal/cuad_pairs.jsonl.gz")
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    partners = Counter((pair["chosen"], pair["rejected"]) for pair in pairs if pair["split"] == "test")
    assert all(partners[second, first] == count for (first, second), count in partners.items())


def test_a_package_without_the_medical_pairs_names_data_that_it_has() -> None:
    advice = fix_for_missing_data("shipped://medical/pubmedqa_pairs.jsonl.gz")
    assert advice and "legal_pairs" in advice and "data prepare" not in advice
