"""Our chat_template.jinja gives the text that `data.convention` trains, as openai-harmony and the published one do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from finetune.config.schema import DataConfig
from finetune.data.checks import BadRecordError
from finetune.data.forms import parse_conversation
from finetune.data.harmony.chat_template import chat_template
from finetune.data.harmony.render import render_example, render_prompt
from finetune.data.harmony.tokenizer import harmony_encoding
from finetune.data.sources import Record

FIXTURES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "fixtures" / "template_fixtures.jsonl").read_text().splitlines()
]
HARMONY = DataConfig(train={})
PUBLISHED = replace(HARMONY, convention="template")
KEYS = ("tools", "builtin_tools", "model_identity", "reasoning_effort", "conversation_date")


def render(config: DataConfig, raw: dict[str, Any], *, is_prompt: bool) -> str:
    messages = list(raw["messages"])
    while is_prompt and messages[-1]["role"] == "assistant":
        messages.pop()
    given = {key: raw[key] for key in KEYS if key in raw}
    text: str = _compile_jinja_template(chat_template(config)).render(
        messages=messages, add_generation_prompt=is_prompt, **given
    )
    return text


def trained(config: DataConfig, raw: dict[str, Any], *, is_prompt: bool) -> str:
    record = Record("x", "x:1", parse_conversation(raw))
    ids = render_prompt(record, config) if is_prompt else render_example(record, config).ids.tolist()
    return harmony_encoding().decode(ids)


@pytest.mark.parametrize("is_prompt", [True, False])
def test_the_published_templates_fixtures(is_prompt: bool) -> None:
    for fixture in FIXTURES:
        text = render(PUBLISHED, fixture["record"], is_prompt=is_prompt)
        assert text == fixture["prompt" if is_prompt else "training"], fixture["record"]


@pytest.mark.parametrize("is_prompt", [True, False])
def test_harmony_on_the_fixtures(is_prompt: bool) -> None:
    for fixture in FIXTURES:
        raw = fixture["record"]
        assert render(HARMONY, raw, is_prompt=is_prompt) == trained(HARMONY, raw, is_prompt=is_prompt), raw


SCHEMAS: list[dict[str, Any]] = [
    {"type": "string", "description": "d1\nd2", "default": "x", "title": "T", "examples": ["e", 3, {"z": 1}]},
    {"type": "integer", "default": 3, "nullable": True},
    {"type": "array", "items": {"type": "string"}, "default": [1, "é"]},
    {"type": "array"},
    {"type": "array", "items": {"oneOf": [{"type": "string"}, {"type": "integer"}]}},
    {"type": "array", "items": {"type": "object", "properties": {"m": {"type": "string"}}, "required": ["m"]}},
    {"type": "array", "items": {"type": "string", "nullable": True, "enum": ["a", "b"]}},
    {"enum": ["p", 1, None]},
    {"type": "string", "enum": ["p", "q", 2], "default": "p"},
    {"type": "string", "enum": []},
    {"type": "string", "enum": [1, 2]},
    {},
    {"type": ["integer", "null"], "default": None},
    {"type": "boolean", "default": True},
    {"type": "null"},
    {"type": "number", "enum": [1, 2], "default": 1.5},
    {"oneOf": [{"type": "string", "description": "s"}, {"type": "number", "description": "n", "default": 1}]},
    {"oneOf": [{"type": "string"}], "default": "v", "enum": ["v"], "description": "one", "title": "T"},
    {"oneOf": [{"type": "object", "properties": {"q": {"type": "string"}}}], "default": {"a": 1}, "examples": ["u"]},
    {"oneOf": [{"type": "string", "enum": ["a"], "default": "a"}, {"type": ["integer", "null"]}]},
    {"oneOf": [{"type": "array", "items": {"type": "object", "description": "z"}}, {"oneOf": [{"type": "string"}]}]},
    {"oneOf": []},
    {"type": "array", "items": {}},
    {"type": []},
    {"type": "string", "description": "", "default": "x", "enum": [], "examples": []},
    {"anyOf": [{"type": "string"}]},
    {"type": "object"},
    {
        "type": "object",
        "description": "o",
        "properties": {"x": {"type": "integer", "description": "xd"}},
        "default": {},
    },
    {"type": "object", "nullable": True, "properties": {"z": {"oneOf": [{"type": "string"}, {"type": "number"}]}}},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
@pytest.mark.parametrize("place", ["property", "nested", "parameters"])
@pytest.mark.parametrize("config", [HARMONY, PUBLISHED], ids=["harmony", "template"])
def test_tool_schemas(schema: dict[str, Any], place: str, config: DataConfig) -> None:
    around = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["b"]}
    if place == "nested":
        around = {"type": "object", "properties": {"outer": around}}
    parameters = schema if place == "parameters" else around
    function = {"name": "f", "description": "Does f.\nTwo lines.", "parameters": parameters}
    messages = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Done"}]
    raw = {"tools": [{"type": "function", "function": function}], "messages": messages}
    try:
        expected = trained(config, raw, is_prompt=True)
    except BadRecordError:
        pytest.skip("not trained")
    assert render(config, raw, is_prompt=True) == expected


def test_several_calls_thinking_and_builtin_tools_as_harmony_has_them() -> None:
    tools = [{"type": "function", "function": {"name": name, "description": "d"}} for name in ("f", "g")]
    calls = [{"id": "1", "function": {"name": "f", "arguments": {"x": "é"}}}, {"id": "2", "function": {"name": "g"}}]
    calls[1]["function"]["arguments"] = {}  # type: ignore[index]
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "I look.", "thinking": "t1", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": "G"},
        {"role": "tool", "tool_call_id": "1", "content": "F"},
        {"role": "assistant", "content": "So.", "thinking": "t2"},
        {"role": "user", "content": "More"},
        {"role": "assistant", "thinking": "t3", "tool_calls": [calls[0]]},
        {"role": "tool", "content": "F"},
        {"role": "assistant", "thinking": "t4", "content": "End."},
    ]
    raw = {"tools": tools, "builtin_tools": ["python", "browser"], "messages": messages}
    for is_prompt in (True, False):
        for config in (HARMONY, replace(HARMONY, earlier_thinking="keep", conversation_date="2030-01-01")):
            assert render(config, raw, is_prompt=is_prompt) == trained(config, raw, is_prompt=is_prompt)
