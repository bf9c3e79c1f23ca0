"""The model card: metadata that the hub reads, limits of the data's own domain, nothing of this machine, no markup."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from finetune.adapters.provenance import BaseRecord
from finetune.config.compose import compose
from finetune.config.schema import RunConfig, SourceConfig
from finetune.config.validate import dump_yaml
from finetune.export.card import write_card
from finetune.export.record import ExportRecord


def card(tmp_path: Path, base: BaseRecord, config: RunConfig | None = None, target: str = "peft") -> tuple[dict, str]:  # type: ignore[type-arg]
    run = None
    if config is not None:
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text(dump_yaml(config))
    record = ExportRecord(target=target, base=base, adapter=None, written="2026-12-01T00:00:00", written_by="test")  # type: ignore[arg-type]
    write_card(tmp_path / "README.md", record, run, ["serve ."])
    text = (tmp_path / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def with_data(*paths: str) -> RunConfig:
    config = compose("quickstart").config
    train = {f"source{number}": SourceConfig(path=path) for number, path in enumerate(paths)}
    return replace(config, data=replace(config.data, train=train))


@pytest.mark.parametrize(
    ("base", "name", "licence"),
    [
        (BaseRecord("openai/gpt-oss-20b", "abc", "0" * 64), "openai/gpt-oss-20b", "apache-2.0"),
        (BaseRecord("/home/me/models/gpt-oss-120b", None, "0" * 64), "openai/gpt-oss-120b", "apache-2.0"),
        (BaseRecord("/home/me/models/tiny", None, "0" * 64), "tiny", None),
        (BaseRecord(), None, None),
    ],
)
def test_metadata_names_base_relation_and_licence(
    base: BaseRecord, name: str | None, licence: str | None, tmp_path: Path
) -> None:
    facts, text = card(tmp_path, base)
    assert (facts.get("base_model"), facts.get("license")) == (name, licence)
    assert facts.get("base_model_relation") == (None if name is None else "adapter")
    assert "/home/me" not in text


def test_hub_data_is_named_and_limits_are_those_of_the_domain(tmp_path: Path) -> None:
    base = BaseRecord("openai/gpt-oss-20b", "abc")
    facts, text = card(tmp_path, base, with_data("hub://someone/contracts", "/home/me/legal/mine.jsonl"))
    assert facts["datasets"] == ["someone/contracts"]
    assert "no legal advice" in text and "no medical advice" not in text
    _, medical = card(tmp_path, base, with_data("/home/me/medical/mine.jsonl"))
    assert "no medical advice" in medical and "no legal advice" not in medical
    facts, other = card(tmp_path, base, with_data("/home/me/secret/mine.jsonl"))
    assert "no legal advice" not in other and "no medical advice" not in other and "datasets" not in facts
    assert "/home/me" not in other and "invent sources" in other


@pytest.mark.parametrize("name", ["x`<script>`", "a: b\nlicense: mit", "# heading", "[link](http://x)", "*bold*"])
def test_a_name_is_neither_markup_nor_a_key(name: str, tmp_path: Path) -> None:
    facts, text = card(tmp_path, BaseRecord(name, "abc"))
    assert facts["base_model"] == name and "license" not in facts
    body = re.sub(r"(`+) .*? \1|`[^`]*`", "", text.split("---\n", 2)[2])  # without code, which is shown as it is
    assert "\nlicense: mit" not in text and "\n# heading" not in body
    assert not re.search(r"(?<!\\)\]\(http|(?<!\\)\*bold|(?<!\\)<script", body)
