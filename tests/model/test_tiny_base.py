"""The tiny base: the published layout as transformers reads it, the same bytes every time, complete or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from finetune.config.paths import shipped_dir
from finetune.errors import ConfigError, MachineError
from finetune.model import tiny
from finetune.model.checkpoint import Checkpoint
from finetune.model.tiny import write_tiny_base
from finetune.mxfp4.format import dequantise

PUBLISHED = shipped_dir("data") / "tokenizer" / "gpt-oss-20b"


@pytest.fixture(scope="module", autouse=True)
def tokenizer_built_once(tiny_base: Path) -> Iterator[None]:
    """Building the tokenizer takes seconds; `tiny_base` has one, and its own test compares its bytes."""

    def copy_tokenizer(directory: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(tiny_base / name, directory / name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.data.harmony.tokenizer.write_tokenizer", copy_tokenizer)
        yield


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_transformers_loads_it_without_a_missing_or_unexpected_key(tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model, info = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.rope_parameters["rope_theta"] == 150000
    checkpoint = Checkpoint.open(tiny_base)
    for projection in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{projection}"
        ours = dequantise(checkpoint.read(f"{name}_blocks"), checkpoint.read(f"{name}_scales"), torch.float32)
        assert torch.equal(model.get_parameter(name), ours.transpose(1, 2))
        assert ours.shape[1] != ours.shape[2]
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert bool(torch.isfinite(logits).all())


def test_the_tokenizer_is_the_published_one(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    assert digests(tiny_base)["tokenizer.json"] == "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    text = "Either party may terminate upon 30 days' notice — naïve 条款\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>", "<|start|>"]) == [200002, 200012, 200006]


def test_the_config_keeps_the_published_keys_and_changes_only_sizes(tiny_base: Path) -> None:
    ours = json.loads((tiny_base / "config.json").read_text())
    published = json.loads((PUBLISHED / "config.json").read_text())
    assert ours.keys() == published.keys()
    sizes = "hidden_size intermediate_size num_hidden_layers layer_types num_attention_heads num_key_value_heads"
    assert {key for key in ours if ours[key] != published[key]} == {*sizes.split(), "head_dim", "num_local_experts"}
    assert (tiny_base / "generation_config.json").read_bytes() == (PUBLISHED / "generation_config.json").read_bytes()


def test_several_shards_with_an_index_and_blocks_right_before_their_scales(tiny_base: Path) -> None:
    index = json.loads((tiny_base / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index["metadata"]["total_size"] == Checkpoint.open(tiny_base).num_bytes
    for shard in shards:
        with safe_open(tiny_base / shard, framework="pt") as file:
            names = list(file.keys())
        for place, name in enumerate(names):
            if name.endswith("_blocks"):
                assert names[place + 1] == name.removesuffix("_blocks") + "_scales"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_base: Path, tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "again", seed=0, kind="random")
    assert digests(tmp_path / "again") == digests(tiny_base)
    write_tiny_base(tmp_path / "other", seed=1, kind="random")
    other, same = digests(tmp_path / "other"), digests(tiny_base)
    changed = {name for name in same if other[name] != same[name]}
    assert changed == {*(name for name in same if name.endswith(".safetensors")), "checksums.json", "README.md"}


def test_the_readme_names_the_kind(tiny_base: Path) -> None:
    assert "Random, not pretrained" in (tiny_base / "README.md").read_text()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="not an empty directory"):
        write_tiny_base(tmp_path / "full", kind="random")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    write_tiny_base(tmp_path / "empty", kind="random")
    Checkpoint.open(tmp_path / "empty")


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(directory: Path) -> None:
        assert list(directory.glob("*.safetensors"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny, "write_checksums", full_disk)
    with pytest.raises(MachineError, match="No space"):
        write_tiny_base(tmp_path / "base", kind="random")
    assert not list(tmp_path.iterdir())
