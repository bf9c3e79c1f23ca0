"""Opening a checkpoint: tensors are read unchanged, and every kind of damage is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import log
from finetune.errors import InputError
from finetune.model.checkpoint import Checkpoint
from finetune.model.headers import read_header
from finetune.model.identity import checkpoint_identity, identity, tensor_digest, verify_checksums

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy to damage: big files are linked, and only ever replaced, not written into."""
    copy = tmp_path / "base"
    copy.mkdir()
    for file in tiny_base.iterdir():
        if file.stat().st_size > 2**20:
            (copy / file.name).hardlink_to(file)
        else:
            shutil.copy(file, copy)
    return copy


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_shard(base: Path, change: Callable[[dict[str, torch.Tensor]], object], shard: str = SHARD) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(base / shard).items()}
    change(tensors)
    (base / shard).unlink()
    save_file(tensors, base / shard)
    edit_json(base / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(tensors, shard)))


def refusal(base: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(base)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_reading_equals_the_safetensors_library(tiny_base: Path) -> None:
    checkpoint = Checkpoint.open(tiny_base)
    seen = 0
    for shard in sorted(tiny_base.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)
            assert checkpoint.tensor_shape(name) == tuple(tensor.shape)
            assert checkpoint.dtype(name) == {torch.uint8: "U8", torch.bfloat16: "BF16"}[tensor.dtype]
            seen += tensor.nbytes
    assert seen == checkpoint.num_bytes == checkpoint.arch.num_bytes()
    assert set(checkpoint.names()) == set(checkpoint.arch.expected_tensors())


def test_reading_maps_the_file_and_copies_nothing(tiny_base: Path) -> None:
    checkpoint = Checkpoint.open(tiny_base)
    first, second = checkpoint.read("lm_head.weight"), checkpoint.read("lm_head.weight")
    assert first.data_ptr() == second.data_ptr()


def test_digests_and_identity_against_their_definition(tiny_base: Path) -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    expected = hashlib.sha256(struct.pack("<12f", *range(12))).hexdigest()
    assert tensor_digest(tensor) == tensor_digest(tensor.T.contiguous().T) == expected
    assert tensor_digest(torch.tensor(1.0, dtype=torch.bfloat16)) == hashlib.sha256(b"\x80\x3f").hexdigest()
    lines = f"a F32 3x4 {expected}\nb U8  {expected}\n"
    entries = [("b", "U8", (), expected), ("a", "F32", (3, 4), expected)]
    assert identity(entries) == hashlib.sha256(lines.encode()).hexdigest()
    assert identity(entries) != identity([("b", "U8", (), expected), ("a", "F32", (4, 3), expected)])


def test_the_identity_does_not_depend_on_sharding_and_does_on_every_bit(base: Path, tiny_base: Path) -> None:
    before = checkpoint_identity(Checkpoint.open(tiny_base), log.Progress("hashing", None, "MiB"))
    everything: dict[str, torch.Tensor] = {}
    for shard in sorted(base.glob("*.safetensors")):
        everything.update(load_file(shard))
        shard.unlink()
    (base / INDEX).unlink()
    save_file(everything, base / "model.safetensors")
    assert checkpoint_identity(Checkpoint.open(base)) == before
    everything["model.layers.1.mlp.experts.down_proj_scales"][0, 0, 0] ^= 1
    save_file(everything, base / "model.safetensors")
    assert checkpoint_identity(Checkpoint.open(base)) != before


def test_the_tiny_base_passes_its_checksums(tiny_base: Path) -> None:
    assert verify_checksums(Checkpoint.open(tiny_base), log.Progress("checking", None, "MiB"))


def test_a_flipped_bit_opens_but_fails_the_checksums(base: Path) -> None:
    content = bytearray((base / SHARD).read_bytes())
    content[-1000] ^= 4
    (base / SHARD).write_bytes(content)
    checkpoint = Checkpoint.open(base)
    with pytest.raises(InputError, match=SHARD) as caught:
        verify_checksums(checkpoint)
    assert "bit-flipped or replaced" in str(caught.value)
    assert "model-00001" not in str(caught.value)
    (base / "checksums.json").unlink()
    assert verify_checksums(checkpoint) is False


def test_checksums_that_leave_out_a_shard_or_name_a_missing_file_are_refused(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    edit_json(base / "checksums.json", lambda sums: sums["files"].update({"gone.json": "0" * 64}))
    with pytest.raises(InputError, match=r"lacks gone\.json"):
        verify_checksums(checkpoint)
    edit_json(base / "checksums.json", lambda sums: sums["files"].pop(SHARD))
    with pytest.raises(InputError, match=f"does not list {SHARD}"):
        verify_checksums(checkpoint)
    edit_json(base / "checksums.json", lambda sums: sums["files"].update({"../config.json": "0"}))
    with pytest.raises(InputError, match="not a file beside it"):
        verify_checksums(checkpoint)


def test_a_missing_shard_is_named(base: Path) -> None:
    (base / SHARD).unlink()
    assert f"lacks {SHARD} of its 3 shards" in refusal(base)


@pytest.mark.parametrize(
    ("keep", "message"), [(-1, "is truncated"), (40, "truncated inside its header"), (3, "not a safetensors file")]
)
def test_a_truncated_shard_is_named(base: Path, keep: int, message: str) -> None:
    content = (base / SHARD).read_bytes()
    (base / SHARD).write_bytes(content[:keep])
    text = refusal(base)
    assert SHARD in text and message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (struct.pack("<Q", 7) + b"notjson", "broken safetensors header"),
        (struct.pack("<Q", 2) + b"[]", "broken safetensors header"),
        (struct.pack("<Q", 2) + b"{}" + b"more", "longer than its header says"),
    ],
)
def test_a_shard_that_is_no_safetensors_file_is_named(base: Path, content: bytes, message: str) -> None:
    (base / SHARD).write_bytes(content)
    text = refusal(base)
    assert SHARD in text and message in text


def test_a_header_whose_offsets_do_not_fit_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(InputError, match="place for a does not fit"):
        read_header(tmp_path / "x")


def test_missing_and_unexpected_tensors_are_named(base: Path) -> None:
    name = "model.layers.1.self_attn.sinks"
    rewrite_shard(base, lambda tensors: tensors.update({"model.layers.1.mlp.extra": tensors.pop(name)}))
    edit_json(base / INDEX, lambda index: index["weight_map"].pop(name))
    text = refusal(base)
    assert f"missing {name}" in text and "unexpected model.layers.1.mlp.extra" in text


def test_a_tensor_of_another_shape_or_dtype_is_named(base: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        blocks = tensors["model.layers.1.mlp.experts.down_proj_blocks"]
        tensors["model.layers.1.mlp.experts.down_proj_blocks"] = blocks.transpose(1, 2).contiguous()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    rewrite_shard(base, change)
    text = refusal(base)
    assert "down_proj_blocks is U8 [8, 3, 64, 16], not U8 [8, 64, 3, 16]" in text
    assert "model.norm.weight is F32 [64], not BF16 [64]" in text


def test_an_index_that_disagrees_with_the_shards_is_refused(base: Path) -> None:
    index = (base / INDEX).read_text()
    edit_json(base / INDEX, lambda content: content["weight_map"].update({"model.norm.weight": "../x.safetensors"}))
    assert "not a file beside it" in refusal(base)
    (base / INDEX).write_text(index)
    edit_json(base / INDEX, lambda content: content["weight_map"].update({"model.extra": SHARD}))
    assert "lists tensors that are in no shard: model.extra" in refusal(base)
    (base / INDEX).write_text(index)
    edit_json(base / INDEX, lambda content: content["weight_map"].pop("model.norm.weight"))
    assert "model.norm.weight, and the index does not list it" in refusal(base)
    (base / INDEX).write_text("{")
    assert "not valid JSON" in refusal(base)
    (base / INDEX).unlink()
    assert f"has neither {INDEX} nor model.safetensors" in refusal(base)


def test_other_models_and_other_storage_are_refused(base: Path) -> None:
    config = (base / "config.json").read_text()
    edit_json(base / "config.json", lambda content: content.pop("quantization_config"))
    assert "has MXFP4 experts, and its config.json has no quantization_config" in refusal(base)
    edit_json(base / "config.json", lambda content: content.update(quantization_config={"quant_method": "fp8"}))
    assert "quant_method 'fp8'" in refusal(base)
    (base / "config.json").write_text(config)
    edit_json(base / "config.json", lambda content: content.update(model_type="mixtral"))
    assert "another architecture" in refusal(base)
    (base / "config.json").write_text("[]")
    assert "not an object" in refusal(base)
    (base / "config.json").unlink()
    assert "config.json cannot be read" in refusal(base)


def test_a_path_that_is_no_directory_is_refused(base: Path) -> None:
    assert "is not a directory" in refusal(base / "config.json")
    assert "there is no directory" in refusal(base / "nowhere")


def test_a_flipped_bit_in_the_hubs_cache_is_found(tiny_base: Path, tmp_path: Path) -> None:
    """The cache keeps large files as blobs named by their sha256; published checkpoints list no checksums."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "commit"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in tiny_base.iterdir():
        if path.name == "checksums.json":
            continue
        content = path.read_bytes()
        large = path.suffix == ".safetensors"
        blob = blobs / (hashlib.sha256(content).hexdigest() if large else f"git-{path.name}")
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(blob)
    assert verify_checksums(Checkpoint.open(snapshot))
    damaged = next(path for path in snapshot.glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.resolve().write_bytes(content)
    with pytest.raises(InputError, match=damaged.name):
        verify_checksums(Checkpoint.open(snapshot))
