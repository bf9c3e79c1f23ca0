"""Parameters of tools in every form, none of them lost; nulls that tables write, told from those that are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.checks import BadRecordError
from finetune.data.forms import parse_conversation
from finetune.data.harmony.render import render_example
from finetune.data.harmony.tokenizer import harmony_encoding
from finetune.data.sources import BadRecord, Record, read_records
from finetune.data.tool_schemas import read_parameters

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}


def record_of(parameters: Any, arguments: Any = None) -> dict[str, Any]:
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"} if arguments is None else arguments}}
    tool = {"name": "weather", "description": "w", "parameters": parameters}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return {"messages": messages, "tools": [{"type": "function", "function": tool}]}


def rendered(raw: dict[str, Any], convention: str = "harmony") -> str:
    record = Record("r", "f:1", parse_conversation(raw), None, {})
    config = DataConfig(train={}, convention=convention)  # type: ignore[arg-type]
    return harmony_encoding().decode(render_example(record, config).ids.tolist())


WANTED = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "The city"}, "days": {"type": "integer"}},
    "required": ["city"],
}
FORMS = {
    "JSON text": json.dumps(WANTED),
    "no type": {key: value for key, value in WANTED.items() if key != "type"},
    "dict": WANTED | {"type": "dict"},
    "OBJECT": {
        "type": "OBJECT",
        "properties": {"city": {"type": "STRING", "description": "The city"}, "days": {"type": "INTEGER"}},
        "required": ["city"],
    },
    "flat": {"city": {"type": "str", "description": "The city"}, "days": {"type": "int, optional"}},
    "flat, optional": {"city": {"type": "string", "description": "The city"}, "days": {"type": "Optional[int]"}},
}


@pytest.mark.parametrize("convention", ["harmony", "template"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_renders_as_the_schema_that_it_means(form: str, convention: str) -> None:
    assert rendered(record_of(FORMS[form]), convention) == rendered(record_of(WANTED), convention)


def test_a_flat_parameter_may_have_any_name_and_a_default_makes_it_optional() -> None:
    flat = {"type": {"type": "str"}, "properties": {"type": "List[int]"}, "limit": {"type": "int", "default": 5}}
    text = rendered(record_of(flat, {"type": "a"}))
    assert "type: string" in text and "properties: number[]" in text and "limit?: number, // default: 5" in text


def test_a_published_schema_keeps_its_text() -> None:
    parameters = {"type": "object", "properties": {"b": {"type": ["string", "null"]}, "a": {"enum": ["x", None]}}}
    assert json.dumps(read_parameters("tool 1", parameters, is_padded=False)) == json.dumps(parameters)


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "anyOf": [{"properties": {"city": {"type": "string"}}}]},
        {"allOf": [{"type": "object", "properties": {"city": {"type": "string"}}}]},
    ],
)
@pytest.mark.parametrize("convention", ["harmony", "template"])
def test_a_parameter_that_the_format_cannot_write_is_a_bad_record(parameters: Any, convention: str) -> None:
    with pytest.raises(BadRecordError, match=r"parameter `city` of tool `weather` is lost"):
        rendered(record_of(parameters), convention)


@pytest.mark.parametrize("parameters", [{"type": "string"}, ["city"], 5, "city", {"city": {"what": 1}}])
def test_what_is_no_schema_of_an_object_is_a_bad_record(parameters: Any) -> None:
    with pytest.raises(BadRecordError):
        rendered(record_of(parameters))


names = st.text("abcdefgh_xyz", min_size=1, max_size=6)
kinds = st.sampled_from(["string", "str", "int", "INTEGER", "float", "list", "List[str]", "dict", "bool", None])


@given(st.dictionaries(names, kinds, min_size=1, max_size=5), st.sampled_from(["flat", "none", "dict", "OBJECT"]))
def test_no_parameter_of_any_schema_is_lost(parameters: dict[str, str | None], form: str) -> None:
    specs = {name: {"description": "d"} | ({"type": kind} if kind else {}) for name, kind in parameters.items()}
    schema: Any = specs if form == "flat" else {"properties": specs} | ({} if form == "none" else {"type": form})
    text = rendered(
        record_of(schema, {}) | {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    )
    for name in parameters:
        assert f"\n{name}: " in text or f"\n{name}?: " in text


# Nulls


def tokens(path: Path) -> list[list[int] | str]:
    config = DataConfig(train={})
    return [
        each.kind if isinstance(each, BadRecord) else render_example(each, config).ids.tolist()
        for each in read_records("mine", SourceConfig(path=str(path)))
    ]


def three_files(records: list[dict[str, Any]], directory: Path) -> dict[str, Path]:
    paths = {
        name: directory / f"{name.replace('.', '_')}.{name.split('.')[-1]}" for name in ("jsonl", "parquet", "to.jsonl")
    }
    paths["jsonl"].write_text("".join(json.dumps(record) + "\n" for record in records))
    table = datasets.Dataset.from_list(records)
    table.to_parquet(str(paths["parquet"]))
    table.to_json(str(paths["to.jsonl"]))
    return paths


def test_padding_of_other_records_is_left_out_of_every_file(tmp_path: Path) -> None:
    """Two tools with different parameters: Arrow gives each the other's, as null."""
    now = record_of({"type": "object", "properties": {"zone": {"type": "string"}}}, {"zone": "CET"})
    records = [record_of({"type": "object", "properties": {"city": {"type": "string"}}}), now]
    paths = three_files(records, tmp_path)
    assert '"zone":null' in paths["to.jsonl"].read_text().replace(" ", ""), "control: there is padding"
    results = [tokens(path) for path in paths.values()]
    assert results[0] == results[1] == results[2] and all(isinstance(each, list) for each in results[0])


def test_a_null_that_may_be_meant_is_kept_in_json_and_refused_in_tables(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"value": {"type": ["number", "null"]}, "unit": {"type": "string"}}}
    record = record_of(schema, {"value": None, "unit": "MB"})
    paths = three_files([record, record_of(schema, {"value": 1.0, "unit": "MB"})], tmp_path)
    assert '{"value": null, "unit": "MB"}' in rendered(record)
    refusal = "null that may be padding"
    assert isinstance(tokens(paths["jsonl"])[0], list)
    assert tokens(paths["parquet"])[0] == tokens(paths["to.jsonl"])[0] == refusal
    assert tokens(paths["jsonl"])[1] == tokens(paths["parquet"])[1] == tokens(paths["to.jsonl"])[1]
    required = record_of(schema | {"required": ["value"]}, {"value": None, "unit": "MB"})
    directory = tmp_path / "required"
    directory.mkdir()
    results = [tokens(path) for path in three_files([required, required], directory).values()]
    assert results[0] == results[1] == results[2] and isinstance(results[0][0], list)


def test_nulls_inside_arguments_are_told_apart_too(tmp_path: Path) -> None:
    inner = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
    schema = {"type": "object", "properties": {"one": inner, "many": {"type": "array", "items": inner}}}
    records = [
        record_of(schema, {"one": {"a": "x"}, "many": [{"a": "x"}, {"b": "y"}]}),
        record_of(schema, {"one": {"b": "y"}, "many": [{"b": "y"}]}),
    ]
    results = [tokens(path) for path in three_files(records, tmp_path).values()]
    assert results[0] == results[1] == results[2] and all(isinstance(each, list) for each in results[0])


@pytest.mark.parametrize("key", ["input_schema", "inputSchema"])
def test_parameters_under_other_apis_keys_are_read(key: str) -> None:
    raw = record_of(WANTED)
    function = raw["tools"][0]["function"]
    function[key] = function.pop("parameters")
    assert rendered(raw) == rendered(record_of(WANTED))
    function["parameters"] = WANTED
    with pytest.raises(BadRecordError, match="twice"):
        rendered(raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": None, "arguments": {"city": {"type": "string"}}}, "but `arguments`: name it `parameters`"),
        ({"parameters": {"city": "string"}}, "`city` of its parameters is lost"),
        ({"parameters": {"city": {"type": "string"}, "required": ["city"]}}, "of its parameters is lost"),
        ({"parameters": {"type": "object", "properties": [{"name": "city"}]}}, "needs an object as `properties`"),
        ({"parameters": {"$ref": "#/$defs/city"}}, "`\\$ref` of its parameters is lost"),
    ],
)
def test_parameters_that_would_be_lost_before_rendering_are_refused(change: dict[str, Any], words: str) -> None:
    raw = record_of(WANTED)
    raw["tools"][0]["function"] |= change
    with pytest.raises(BadRecordError, match=words):
        rendered(raw)


def test_a_null_that_its_schema_forbids_is_padding_in_tables_and_kept_as_written(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": "string"}}}
    records = [record_of(schema, {"city": "Oslo", "unit": None}), record_of(schema, {"city": "Rome", "unit": "C"})]
    assert '{"city": "Oslo", "unit": null}' in rendered(records[0]), "as the published template writes it"
    paths = three_files(records, tmp_path)
    absent = rendered(record_of(schema, {"city": "Oslo"}))
    for name in ("parquet", "to.jsonl"):
        assert harmony_encoding().decode(tokens(paths[name])[0]) == absent  # type: ignore[arg-type]
