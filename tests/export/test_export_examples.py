"""A model card shows records only if the recipe allows it, and as text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from finetune.adapters.store import BaseRecord
from finetune.config.compose import compose
from finetune.config.schema import RunConfig
from finetune.export.card import examples_section, write_card
from finetune.export.record import AdapterOrigin, ExportRecord


def config(tmp_path: Path, *, share: bool) -> RunConfig:
    row = (
        '{"messages": [{"role": "user", "content": "# not a heading\\n<b>?"}, {"role": "assistant", "content": "a"}]}\n'
    )
    (tmp_path / "rows.jsonl").write_text(row * 5)
    composed = compose("quickstart", [f"export.share_examples={str(share).lower()}", "data.cache=false"]).config
    source = replace(composed.data.test["cuad"], path=str(tmp_path / "rows.jsonl"), where={})
    return replace(composed, data=replace(composed.data, test={"cuad": source}))


def test_no_record_is_shown_by_default(tmp_path: Path) -> None:
    assert examples_section(config(tmp_path, share=False)) == "" == examples_section(None)


def test_allowed_records_are_shown_unchanged(tmp_path: Path) -> None:
    section = examples_section(config(tmp_path, share=True))
    assert section.count("user: # not a heading") == 3
    lines = section.splitlines()
    assert not any(line.startswith(("# ", "<")) for line in lines), "text of the data became markup"


def test_missing_data_is_reported_in_the_section(tmp_path: Path) -> None:
    shared = config(tmp_path, share=True)
    (tmp_path / "rows.jsonl").unlink()
    assert "could not be read" in examples_section(shared)


def test_hostile_names_stay_text_in_a_card(tmp_path: Path) -> None:
    evil = "x`<script>[a](http://b)\x1b[31m"
    (tmp_path / "manifest.json").write_text(
        json.dumps({"recipe": evil, "data": {evil: {"rows": 1, "tokens": 2, "trained_tokens": 1, "fingerprint": evil}}})
    )
    record = ExportRecord(
        target="peft", base=BaseRecord(evil, revision=evil, identity=evil), adapter=AdapterOrigin("x", "0", 1)
    )  # fmt: skip
    card = tmp_path / "README.md"
    write_card(card, record, tmp_path, ["serve it"])
    text = re.sub(r"(`+) .*? \1", "", card.read_text().partition("\n# ")[2], flags=re.S)  # without code
    assert "\x1b" not in card.read_text() and "script" in text
    assert not re.search(r"(?<!\\)<script>|(?<!\\)\[a\\?\]", text)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("")
    shared = config(tmp_path, share=True)
    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "\\u001b[2J"}, {"role": "assistant", "content": "a"}]}\n'
    )
    assert "\x1b" not in examples_section(shared) and "\\x1b[2J" in examples_section(shared)
