"""A bfloat16 gpt-oss as base: experts are quantised to MXFP4 while reading, and this is logged and recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import BOTH, new_base, randomised, sample, write
from transformers import AutoModelForCausalLM, Mxfp4Config

from finetune.adapters import read_back as read_back_module
from finetune.adapters.read_back import read_back
from finetune.cli.main import main
from finetune.errors import CheckError, InputError
from finetune.export.base import native_base
from finetune.model.build import check_unchanged
from finetune.model.checkpoint import Checkpoint, DenseCheckpoint
from finetune.model.forward import logits
from finetune.model.identity import checkpoint_identity


def write_dense(native: Path, directory: Path, *, noise: float) -> Path:
    """The native base as transformers dequantises it, each expert weight changed by a share of itself."""
    model = AutoModelForCausalLM.from_pretrained(
        native, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, tensor in model.state_dict().items():
        if ".experts." in name and not name.endswith("bias"):
            tensor = (tensor.float() * (1 + noise * torch.randn(tensor.shape, generator=generator))).bfloat16()
        state[name] = tensor.contiguous()
    directory.mkdir()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((native / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def noisy(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tiny_base, tmp_path_factory.mktemp("dense") / "noisy", noise=0.05)


def test_a_dequantised_native_base_is_recovered(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    native, dense = new_base(tiny_base), new_base(write_dense(tiny_base, tmp_path / "exact", noise=0.0))
    assert "they had MXFP4 values: nothing lost" in capfd.readouterr().err
    ids = torch.from_numpy(sample().ids).long()
    with torch.no_grad():
        assert torch.equal(logits(native.model, ids), logits(dense.model, ids))
    assert dense.identity != native.identity, "the identity is that of the files"


def test_identity_is_that_of_the_files_and_the_base_stays_frozen(noisy: Path) -> None:
    lines = []
    for name, tensor in load_file(noisy / "model.safetensors").items():
        digest = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        lines.append(f"{name} BF16 {'x'.join(map(str, tensor.shape))} {digest}\n")
    wanted = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    base = new_base(noisy)
    assert base.identity == wanted == checkpoint_identity(Checkpoint.open(noisy)) == check_unchanged(base)
    base.model.model.layers[1].mlp.experts.gate_up_proj_blocks[0, 0, 0, 0] ^= 1
    with pytest.raises(CheckError, match="gate_up_proj_blocks"):
        check_unchanged(base)


def test_the_rounding_is_measured_and_logged(noisy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = new_base(noisy)
    assert isinstance(base.checkpoint, DenseCheckpoint)
    lost = total = 0.0
    for name, tensor in load_file(noisy / "model.safetensors").items():
        if ".experts." in name and not name.endswith("bias"):
            blocks, scales = (base.checkpoint.read(f"{name}_{part}") for part in ("blocks", "scales"))
            codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()  # by hand, from the facts
            table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            values = torch.where(codes < 8, table[codes % 8], -table[codes % 8]) * 2.0 ** (scales[..., None] - 127.0)
            rounded = values.flatten(-2).mT
            lost += (tensor.float() - rounded).square().sum().item()
            total += tensor.float().square().sum().item()
    error = (lost / total) ** 0.5
    assert 0.01 < error < 0.2
    assert base.expert_rounding_error == pytest.approx(error, rel=1e-4)
    assert f"rounding changed them by {error:.1%}" in capfd.readouterr().err


def test_parts_of_experts_read_as_the_whole(noisy: Path) -> None:
    checkpoint = Checkpoint.open(noisy)
    for name in ("model.layers.0.mlp.experts.down_proj_blocks", "model.layers.0.mlp.experts.gate_up_proj_scales"):
        assert torch.equal(checkpoint.read_rows(name, 3, 5), checkpoint.read(name)[3:5])
    assert checkpoint.names() == list(checkpoint.arch.expected_tensors())


def test_the_read_back_computes_with_the_rounded_weights(noisy: Path, tmp_path: Path) -> None:
    base = new_base(noisy)
    adapter = randomised(base, BOTH)
    result = read_back(base, adapter, write(tmp_path / "adapter", adapter, BOTH, base), [sample(40)])
    assert result.max_difference <= result.limit
    assert result.base_difference <= result.base_limit
    assert result.base_limit < 1e-2


@pytest.mark.slow
def test_the_read_back_fails_with_the_original_weights(
    noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = new_base(noisy)
    adapter = randomised(base, BOTH)
    monkeypatch.setattr(read_back_module, "_trained_base", lambda base, scratch: noisy)
    with pytest.raises(CheckError, match="the base alone by"):
        read_back(base, adapter, write(tmp_path / "adapter", adapter, BOTH, base), [sample(40)])


def test_expert_tensors_of_another_shape_or_dtype_are_refused(noisy: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(noisy, bad)
    tensors = load_file(bad / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    save_file(tensors | {name: tensors[name].mT.contiguous()}, bad / "model.safetensors")
    with pytest.raises(InputError, match="down_proj is BF16"):
        Checkpoint.open(bad)
    save_file(tensors | {name: tensors[name].float()}, bad / "model.safetensors")
    with pytest.raises(InputError, match=r"is in float32: 1 of its .*down_proj"):
        Checkpoint.open(bad)


def test_merges_use_a_native_copy_that_is_removed(noisy: Path, tmp_path: Path) -> None:
    dense = Checkpoint.open(noisy)
    with native_base(dense, tmp_path / "out") as native:
        assert (
            not isinstance(native, DenseCheckpoint) and native.config["quantization_config"]["quant_method"] == "mxfp4"
        )
        assert all(torch.equal(native.read(name), dense.read(name)) for name in dense.names())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["bf16", "mxfp4"])
def test_an_adapter_of_it_is_merged_and_verified(target: str, noisy: Path, tmp_path: Path) -> None:
    base = new_base(noisy)
    directory = write(tmp_path / "adapter", randomised(base, BOTH), BOTH, base)
    words = ["export", directory, "--to", target, "--base", noisy, "--out", tmp_path / "out"]
    words += ["--rounding", "nearest"] if target == "mxfp4" else []  # there is no run to calibrate on
    assert main([str(word) for word in words]) == 0
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in merged) == (target == "mxfp4")
