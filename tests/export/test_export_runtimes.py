"""Merged exports read by third-party runtimes, and a verification that finds errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from merging import GATE_UP, IDS
from safetensors.torch import load_file, save_file
from tolerances import log_probability_noise
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config

from finetune.adapters.store import AdapterFile
from finetune.data.harmony.render import Example
from finetune.errors import CheckError
from finetune.export.plan import plan_merge
from finetune.export.record import LogitsCheck
from finetune.export.verify import compare_logits, compare_weights
from finetune.model.checkpoint import Checkpoint
from finetune.rounding.merge import Tally

# --- others' runtimes


def foreign(kind: str, base: Path, out: Path) -> np.ndarray:
    script = Path(__file__).with_name("foreign_logits.py")
    subprocess.run([sys.executable, script, kind, base, "", json.dumps(IDS), out], check=True, capture_output=True)
    return np.load(out)


def truncating(directory: Path, to: Path) -> Path:
    """The same checkpoint with YaRN's `truncate` on, as llama.cpp and mlx-lm compute it whatever config.json says."""
    to.mkdir()
    for path in directory.iterdir():
        (to / path.name).symlink_to(path)
    config = json.loads((directory / "config.json").read_text())
    config["rope_scaling"]["truncate"] = True
    (to / "config.json").unlink()
    (to / "config.json").write_text(json.dumps(config))
    return to


def in_transformers(directory: Path) -> GptOssForCausalLM:
    packed = "quantization_config" in json.loads((directory / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        **({"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}),
    ).float()


@torch.no_grad()
def logits_of(model: GptOssForCausalLM) -> torch.Tensor:
    return model(input_ids=torch.tensor([IDS])).logits[0]


def log_probabilities(model: GptOssForCausalLM) -> np.ndarray:
    return logits_of(model).double().log_softmax(-1).numpy()


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="needs mlx[cpu] and mlx-lm (extra `dev`)")
def test_mlx_lm_reads_the_native_directory(exported: Callable[..., Path], tmp_path: Path) -> None:
    out = exported("mxfp4")
    theirs = foreign("mlx", out, tmp_path / "mlx.npy")
    model = in_transformers(truncating(out, tmp_path / "truncating"))
    limit = log_probability_noise(model, lambda: logits_of(model))
    assert np.abs(theirs - log_probabilities(model)).max() <= limit < 1e-2
    not_truncating = log_probabilities(in_transformers(out))
    assert np.abs(theirs - not_truncating).max() > 20 * limit, "another RoPE setting would show"


@pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None, reason="needs gguf and xllamacpp (extra `dev`)"
)
@pytest.mark.parametrize("experts", ["bf16", "mxfp4"])
def test_llama_cpp_reads_the_gguf_file(experts: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp rounds activations to bfloat16 or 8 bits where weights are, so it is given the file widened as well."""
    out = exported("gguf", "--gguf-experts", experts)
    file = out / f"model-{experts}.gguf"
    expected = log_probabilities(in_transformers(truncating(exported(experts), tmp_path / "truncating")))[-1]
    wide = foreign("llama", widened(file, tmp_path / "wide.gguf"), tmp_path / "wide.npy")
    assert len(wide) == 50
    assert np.abs(wide[:, 1] - expected[wide[:, 0].astype(int)]).max() < 0.01
    stored = foreign("llama", file, tmp_path / "stored.npy")
    assert np.abs(stored[:, 1] - expected[stored[:, 0].astype(int)]).max() < 0.2


def widened(file: Path, to: Path) -> Path:
    """The same file with every tensor in float32, by the gguf package alone."""
    import gguf

    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(to, "gpt-oss")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


# --- verification: negative controls


def test_verification_finds_every_wrong_tensor(
    exported: Callable[..., Path], adapter: Path, small_base: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(exported("bf16"), bad)
    shard = next(bad.glob("*.safetensors"))
    tensors = load_file(shard)
    swapped = tensors[GATE_UP].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # up where gate belongs: the same shape
    tensors[GATE_UP] = swapped.contiguous()
    tensors["model.layers.0.self_attn.q_proj.weight"][5, 7] += 0.5
    tensors["model.norm.weight"][3] += 0.01
    tensors["lm_head.weight"][0, 0] = float("nan")
    del tensors["model.layers.1.self_attn.sinks"]
    tensors["model.extra"] = torch.zeros(2)
    save_file(tensors, shard, metadata={"format": "pt"})
    plan = plan_merge(Checkpoint.open(small_base), AdapterFile.open(adapter), "bf16")
    updates = json.loads((exported("bf16") / "export.json").read_text())["updates"]
    tallies = {name: Tally(wanted=norm**2) for name, norm in updates.items()}
    problems = compare_weights(plan, "bf16", bad, tallies).problems
    assert problems == {
        "model.extra": "unexpected",
        "model.layers.1.self_attn.sinks": "missing",
        "lm_head.weight": "values that are not finite",
        "model.norm.weight": "differs from the base, though the adapter leaves it alone",
        "model.layers.0.self_attn.q_proj": "1 places are not base + update, correctly rounded",
        GATE_UP: problems[GATE_UP],
    }
    assert "places are not base + update" in problems[GATE_UP]


def test_verification_finds_every_wrong_setting(
    exported: Callable[..., Path], adapter: Path, small_base: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(exported("bf16"), bad, copy_function=os.link)
    damages: dict[str, dict[str, object]] = {
        "config.json": {"swiglu_limit": 6.0},
        "generation_config.json": {"eos_token_id": [1]},
        "tokenizer_config.json": {"eos_token": "<|other|>"},
        "tokenizer.json": {"added_tokens": []},
        "chat_template.jinja": {},
    }
    for file, damage in damages.items():
        content = json.dumps(json.loads((bad / file).read_text()) | damage) if damage else "x"
        (bad / file).unlink()
        (bad / file).write_text(content)
    plan = plan_merge(Checkpoint.open(small_base), AdapterFile.open(adapter), "bf16")
    updates = json.loads((exported("bf16") / "export.json").read_text())["updates"]
    tallies = {name: Tally(wanted=norm**2) for name, norm in updates.items()}
    template = (small_base / "chat_template.jinja").read_text()
    problems = compare_weights(plan, "bf16", bad, tallies, template).problems
    assert problems.keys() == damages.keys()
    assert problems["config.json"] == "swiglu_limit is '6.0' where '7.0' is meant"
    assert all(key in problems[file] for file, damage in damages.items() for key in damage)


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf (extra `dev`)")
def test_verification_finds_every_wrong_setting_of_a_gguf_file(
    exported: Callable[..., Path], adapter: Path, small_base: Path, tmp_path: Path
) -> None:
    import gguf

    out = exported("gguf", "--gguf-experts", "mxfp4")
    file = tmp_path / "model-mxfp4.gguf"
    shutil.copyfile(out / file.name, file)
    reader = gguf.GGUFReader(file, "r+")
    changed = {
        "gpt-oss.rope.freq_base": 1e4,
        "gpt-oss.attention.sliding_window": 64,
        "gpt-oss.expert_used_count": 2,
        "gpt-oss.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.eos_token_id": 7,
    }
    for name, value in changed.items():
        field = reader.fields[name]
        field.parts[field.data[0]][0] = value
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template"):
        field = reader.fields[name]
        field.parts[field.data[-1]][0] ^= 1
    del reader
    plan = plan_merge(Checkpoint.open(small_base), AdapterFile.open(adapter), "mxfp4")
    record = json.loads((out / "export.json").read_text())
    tallies = {name: Tally(wanted=norm**2) for name, norm in record["updates"].items()}
    template = (small_base / "chat_template.jinja").read_text()
    problems = compare_weights(plan, "gguf", tmp_path, tallies, template).problems
    expected = set(changed) | {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template"}
    assert expected == {name for name in problems if not name.startswith("model.")}


@pytest.mark.slow
def test_logits_are_compared_and_a_lost_rope_setting_is_found(
    exported: Callable[..., Path], adapter: Path, small_base: Path, tmp_path: Path
) -> None:
    """Correct weights do not suffice: only transformers 5 reads `rope_parameters`, other readers lose YaRN."""
    samples = [Example(np.array(IDS, dtype=np.int32), np.ones(len(IDS)), "random", "nowhere:1")]
    native = plan_merge(Checkpoint.open(small_base), AdapterFile.open(adapter), "mxfp4")
    found = compare_logits(native, exported("mxfp4"), samples)
    assert isinstance(found, LogitsCheck) and found.merged is not None and found.limit is not None
    assert found.merged.max_difference <= found.limit
    assert found.limit < 1e-2 < found.adapted.max_difference
    assert found.base.mean_kl > found.adapted.mean_kl > 0
    shutil.copytree(exported("bf16"), tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    del config["rope_scaling"], config["rope_theta"]
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default"}}))
    dense = plan_merge(Checkpoint.open(small_base), AdapterFile.open(adapter), "bf16")
    right = compare_logits(dense, exported("bf16"), samples)
    assert isinstance(right, LogitsCheck) and right.limit is not None
    assert right.adapted.mean_kl <= right.limit < 0.2 * right.base.mean_kl
    with pytest.raises(CheckError, match="is not the model that was merged"):
        compare_logits(dense, tmp_path / "bad", samples)
