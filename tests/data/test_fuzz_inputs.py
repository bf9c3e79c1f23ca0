"""Random third-party files: whatever their contents, the result is a message and a known exit code, never a
traceback. The quick tests draw a few dozen examples; the slow ones thousands.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.adapters.store import AdapterFile
from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.dataset import load_split
from finetune.errors import FinetuneError
from finetune.model.headers import read_header

QUIET = settings(
    deadline=None, max_examples=40, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(QUIET, max_examples=2000, derandomize=False)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "..", "../x", "\0", "\ud800", "${x:y}", "${seed}", "???", "1e400", "~", "a" * 300])
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
)


def must_answer(call: Callable[[], object]) -> None:
    """Only an error that is meant for the user may be raised."""
    try:
        call()
    except FinetuneError as error:
        assert error.exit_code in (2, 3, 4, 5, 6) and str(error)


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


# ---- recipes --------------------------------------------------------------------------------------------------------

KEYS = [
    "name",
    "output_dir",
    "seed",
    "model",
    "data",
    "adapter",
    "trainer",
    "save",
    "evaluate",
    "logging",
    "export",
    "distributed",
    "defaults",
    "zzz",
]
INNER = [
    "path",
    "train",
    "max_length",
    "rank",
    "attention",
    "experts",
    "layers",
    "epochs",
    "schedule",
    "every_steps",
    "keep",
    "background",
    "mode",
    "targets",
    "kind",
    "dropout",
    "loss",
    "where",
    "weight",
]
sections = st.dictionaries(st.sampled_from(INNER), anything, max_size=4)
recipes = st.dictionaries(st.sampled_from(KEYS), sections | anything, max_size=4)
overrides = st.builds(
    "{}{}={}".format,
    st.sampled_from(["", "+", "++", "~"]),
    st.builds(".".join, st.lists(st.sampled_from([*KEYS, *INNER]), min_size=1, max_size=3)),
    st.text(max_size=12) | anything.map(lambda value: json.dumps(value, allow_nan=True)),
)


def check_recipe(directory: Path, recipe: Any, words: list[str]) -> None:
    path = directory / "recipe.yaml"
    text = recipe if isinstance(recipe, str) else "# @package _global_\n" + json.dumps(recipe)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    must_answer(lambda: compose(str(path), words))
    assert [file.name for file in directory.iterdir()] == ["recipe.yaml"]


@QUIET
@given(recipe=recipes | st.text(), words=st.lists(overrides, max_size=2))
def test_recipes(tmp_path_factory: pytest.TempPathFactory, recipe: Any, words: list[str]) -> None:
    check_recipe(tmp_path_factory.mktemp("recipe"), recipe, words)


@pytest.mark.slow
@LONG
@given(recipe=recipes | st.text(), words=st.lists(overrides, max_size=2))
def test_many_recipes(tmp_path_factory: pytest.TempPathFactory, recipe: Any, words: list[str]) -> None:
    check_recipe(tmp_path_factory.mktemp("recipe"), recipe, words)


@pytest.mark.parametrize(
    "words",
    [
        ['name="a\\0b"'],
        [f"name={'a' * 300}"],
        [f"model.path={'a' * 5000}"],
        [f"data.train.mine.path={'b/' * 3000}"],
        ["seed=" + "9" * 5000],
        ["adapter.layers=" + deep(2000)],
        ["trainer.epochs=1e999"],
    ],
    ids=lambda words: words[0][:30],
)
def test_values_that_break_the_reader(
    workplace: Path, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = main(["train", str(workplace / "small.yaml"), f"output_dir={tmp_path}", *words, "--dry-run"])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert code in (0, 2, 3, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["a: " + deep(3000), 'name: "\\ud800"', 'name: "a\\0b"', "seed: " + "9" * 5000, "\x00"]
)
def test_yaml_that_breaks_the_reader(tmp_path: Path, text: str) -> None:
    check_recipe(tmp_path, text, [])


# ---- safetensors headers --------------------------------------------------------------------------------------------

entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "X"]) | anything,
        "shape": st.lists(st.integers(-3, 2**70), max_size=3) | anything,
        "data_offsets": st.lists(st.integers(-3, 40), max_size=3) | anything,
    },
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=5), entries | anything, max_size=3
)


def check_header(directory: Path, header: bytes, length: int | None, data: bytes) -> None:
    path = directory / "x.safetensors"
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + data)
    must_answer(lambda: read_header(path))


header_bytes = headers.map(lambda header: json.dumps(header).encode("utf-8", "surrogatepass")) | st.binary(max_size=60)
lengths = st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])


@QUIET
@given(header=header_bytes, length=lengths, data=st.binary(max_size=40))
def test_headers(tmp_path_factory: pytest.TempPathFactory, header: bytes, length: int | None, data: bytes) -> None:
    check_header(tmp_path_factory.mktemp("header"), header, length, data)


@pytest.mark.slow
@LONG
@given(header=header_bytes, length=lengths, data=st.binary(max_size=40))
def test_many_headers(tmp_path_factory: pytest.TempPathFactory, header: bytes, length: int | None, data: bytes) -> None:
    check_header(tmp_path_factory.mktemp("header"), header, length, data)


@pytest.mark.parametrize(
    "header",
    [
        deep(100_000),
        '{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"X","shape":[],"data_offsets":[0,-4]}}',
    ],
    ids=lambda header: header[:40],
)
def test_headers_that_break_the_reader(tmp_path: Path, header: str) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(FinetuneError, match="broken safetensors header"):
        read_header(tmp_path / "x")


# ---- adapters -------------------------------------------------------------------------------------------------------

SETTINGS = [
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "target_modules",
    "use_rslora",
    "bias",
    "base_model_name_or_path",
    "revision",
    "modules_to_save",
]
configs = st.dictionaries(st.sampled_from(SETTINGS), anything, max_size=4).map(
    lambda c: {"peft_type": "LORA", "r": 2} | c
)
provenances = (
    st.none()
    | anything
    | st.dictionaries(st.sampled_from(["files", "base_identity", "base_name", "base_held_as"]), anything)
)


def check_adapter(directory: Path, config: Any, provenance: Any) -> None:
    """A weight file with one good pair beside the random JSON."""
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": [2, 4], f"{module}.lora_B.weight": [4, 2]}
    spans = {"lora_A": [0, 32], "lora_B": [32, 64]}
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": shape, "data_offsets": spans[name.split(".")[-2]]}
            for name, shape in shapes.items()
        }
    ).encode()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    for name, content in (("adapter_config.json", config), ("finetune.json", provenance)):
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    before = sorted(directory.iterdir())
    must_answer(lambda: AdapterFile.open(directory))
    assert sorted(directory.iterdir()) == before


def test_the_adapter_is_one_when_nothing_is_random(tmp_path: Path) -> None:
    check_adapter(tmp_path, {"peft_type": "LORA", "r": 2, "lora_alpha": 4}, None)
    assert AdapterFile.open(tmp_path).sites[0].scale == 2


@QUIET
@given(config=configs | anything, provenance=provenances)
def test_adapters(tmp_path_factory: pytest.TempPathFactory, config: Any, provenance: Any) -> None:
    check_adapter(tmp_path_factory.mktemp("adapter"), config, provenance)


@pytest.mark.slow
@LONG
@given(config=configs | anything, provenance=provenances)
def test_many_adapters(tmp_path_factory: pytest.TempPathFactory, config: Any, provenance: Any) -> None:
    check_adapter(tmp_path_factory.mktemp("adapter"), config, provenance)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", ".*.*.*.*.*.*x", "(", "a{99999999999}"])
def test_patterns_that_never_end_are_refused(tmp_path: Path, pattern: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {pattern: 2}}
    check_adapter(tmp_path, config, None)
    with pytest.raises(FinetuneError, match="rank_pattern"):
        AdapterFile.open(tmp_path)


# ---- rows -----------------------------------------------------------------------------------------------------------

messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "thinking", "tool_calls", "channel", "train"]),
        st.sampled_from(["user", "assistant", "system", "<|start|>"]) | anything,
    )
    | anything,
    max_size=3,
)
rows = st.dictionaries(
    st.sampled_from(["messages", "prompt", "completion", "text", "answer", "tools", "conversations", "instruction"]),
    messages | anything,
    max_size=3,
)
lines = (
    rows.map(lambda row: json.dumps(row).encode())
    | anything.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=40)
    | st.sampled_from([deep(50_000).encode(), b"\xef\xbb\xbf{}", b"9" * 5000])
)


def check_rows(directory: Path, given_lines: list[bytes], on_bad_record: str) -> None:
    path = directory / "rows.jsonl"
    path.write_bytes(b"\n".join(given_lines))
    source = {"mine": SourceConfig(path=str(path))}
    config = DataConfig(train=source, cache=False, on_bad_record=on_bad_record, max_skipped_ratio=1.0)  # type: ignore[arg-type]
    must_answer(lambda: load_split(config, "train"))
    assert [file.name for file in directory.iterdir()] == ["rows.jsonl"]


@QUIET
@given(given_lines=st.lists(lines, max_size=3), on_bad_record=st.sampled_from(["stop", "skip"]))
def test_examples(tmp_path_factory: pytest.TempPathFactory, given_lines: list[bytes], on_bad_record: str) -> None:
    check_rows(tmp_path_factory.mktemp("rows"), given_lines, on_bad_record)


@pytest.mark.slow
@LONG
@given(given_lines=st.lists(lines, max_size=3), on_bad_record=st.sampled_from(["stop", "skip"]))
def test_many_records(tmp_path_factory: pytest.TempPathFactory, given_lines: list[bytes], on_bad_record: str) -> None:
    check_rows(tmp_path_factory.mktemp("rows"), given_lines, on_bad_record)
