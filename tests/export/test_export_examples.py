"""A model card shows records only if the recipe allows it, and as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finetune.config.compose import compose
from finetune.config.schema import RunConfig
from finetune.export.card import examples_section


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
