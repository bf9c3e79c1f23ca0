"""Sizes and tensors of the published models, from their published config.json."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.arch import Arch
from finetune.errors import InputError


def published_config(**changes: Any) -> dict[str, Any]:
    """The config.json of openai/gpt-oss-20b, with changes; a value of ... removes the key."""
    layers = 24
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "rms_norm_eps": 1e-05,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def config_120b() -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"] * 18
    return published_config(num_hidden_layers=36, num_local_experts=128, layer_types=kinds)


@pytest.mark.parametrize(
    ("config", "tensors", "num_bytes"),
    [(published_config(), 459, 13_761_264_768), (config_120b(), 687, 65_248_815_744)],
    ids=["20b", "120b"],
)
def test_counts_and_bytes_of_the_published_checkpoints(config: dict[str, Any], tensors: int, num_bytes: int) -> None:
    shape = Arch.from_config(config, "config.json")
    assert len(shape.expected_tensors()) == tensors
    assert shape.num_bytes() == num_bytes


def test_shapes_of_one_layer() -> None:
    shape = Arch.from_config(published_config(intermediate_size=1440), "config.json")
    tensors = shape.expected_tensors()
    prefix = "model.layers.23."
    assert tensors[prefix + "mlp.experts.gate_up_proj_blocks"] == ("U8", (32, 2880, 90, 16))
    assert tensors[prefix + "mlp.experts.gate_up_proj_scales"] == ("U8", (32, 2880, 90))
    assert tensors[prefix + "mlp.experts.down_proj_blocks"] == ("U8", (32, 2880, 45, 16))
    assert tensors[prefix + "self_attn.k_proj.weight"] == ("BF16", (512, 2880))
    assert tensors[prefix + "self_attn.o_proj.weight"] == ("BF16", (2880, 4096))
    names = list(tensors)
    for name in names:
        if name.endswith("_blocks"):  # llama.cpp pairs each _scales with the last _blocks it saw
            assert names[names.index(name) + 1] == name.removesuffix("_blocks") + "_scales"


def test_names_are_those_of_transformers() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    kinds = ["sliding_attention", "full_attention"]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4}
    config = published_config(**sizes, layer_types=kinds, vocab_size=512, head_dim=32, num_attention_heads=4)
    config["num_key_value_heads"] = 2
    theirs = {name: tuple(p.shape) for name, p in GptOssForCausalLM(GptOssConfig(**config)).named_parameters()}
    ours: dict[str, tuple[int, ...]] = {}
    for name, (_, shape) in Arch.from_config(config, "config.json").expected_tensors().items():
        if name.endswith("_blocks"):
            experts, out_size, groups, _bytes = shape
            ours[name.removesuffix("_blocks")] = (experts, groups * 32, out_size)
        elif not name.endswith("_scales"):
            ours[name] = shape
    assert ours == theirs


def test_another_architecture_is_named() -> None:
    with pytest.raises(InputError, match="another architecture: model_type is 'llama'") as caught:
        Arch.from_config({"model_type": "llama"}, "base/config.json")
    assert caught.value.exit_code == 3
    assert "base/config.json" in str(caught.value)


def test_all_missing_keys_are_named_with_lookalikes() -> None:
    config = published_config(head_dim=..., hidden_size=..., hiden_size=64)
    with pytest.raises(InputError, match=r"lacks hidden_size \(it has hiden_size\), head_dim"):
        Arch.from_config(config, "config.json")


def test_either_name_of_the_active_experts_will_do() -> None:
    assert Arch.from_config(published_config(num_experts_per_tok=...), "c").num_active_experts == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"]}, "1 entries for 24 layers"),
        ({"layer_types": ["linear_attention"] * 24}, "'linear_attention'"),
        ({"num_key_value_heads": 7}, "64 query heads"),
        ({"hidden_size": 100}, "multiples of 32"),
        ({"num_experts_per_tok": 33}, "33 experts per token of 32"),
        ({"hidden_size": "2880"}, "not a positive whole number"),
        ({"num_hidden_layers": 0}, "not a positive whole number"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": False}, "attention_bias"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Arch.from_config(published_config(**changes), "config.json")


def test_reading_dimensions_does_not_import_torch() -> None:
    code = "import sys, finetune.arch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "not an object"),
        ('{"model_type": "llama"}', "'llama'"),
        ('{"model_type": "gpt_oss", "hidden_size": 64}', "lacks"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_config_is_named(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=words):
        Arch.read(tmp_path / "config.json")
