"""Every example of docs/guide/data.md's second half renders, and its YAML is what a recipe takes."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from finetune.config.schema import DataConfig
from finetune.data.forms import parse_conversation
from finetune.data.harmony.render import render_examples
from finetune.data.harmony.tokenizer import harmony_encoding
from finetune.data.sources import Record

GUIDE = (
    (Path(__file__).parents[2] / "docs" / "guide" / "data.md")
    .read_text()
    .partition("\n# Conversations and tokens\n")[2]
)
RECORDS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)]
NUM_ANSWERS = {"chosen": 2, "completions": 2}  # of the examples of preference forms


@pytest.mark.parametrize("raw", RECORDS, ids=lambda raw: next(iter(raw)))
def test_examples_render(raw: dict[str, object]) -> None:
    examples = render_examples(Record("x", "x:1", parse_conversation(raw)), DataConfig(train={}))
    assert len(examples) == next((count for key, count in NUM_ANSWERS.items() if key in raw), 1)
    assert all(example.num_trained_tokens for example in examples)


def test_the_first_example_is_written_as_the_guide_says() -> None:
    assert len(RECORDS) == 9
    (example,) = render_examples(Record("x", "x:1", parse_conversation(RECORDS[0])), DataConfig(train={}))
    text = harmony_encoding().decode_utf8(example.ids.tolist())
    assert text.endswith(
        "<|start|>assistant<|channel|>analysis<|message|>I need the weather.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
        "<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>"
        '{"city": "Oslo"}<|call|>'
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>{"rain": true}<|end|>'
        "<|start|>assistant<|channel|>analysis<|message|>It says so.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes<|return|>"
    )


def test_the_yaml_holds_the_defaults() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    data = yaml.safe_load(block)["data"]
    defaults = asdict(DataConfig(train={}))
    assert {key: defaults[key] for key in data} == data
