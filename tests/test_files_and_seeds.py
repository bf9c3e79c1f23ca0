"""Files written whole or not at all, JSON whose faults are named, and seeds made from words."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune import files
from finetune.errors import InputError, MachineError
from finetune.files import read_json, replaced_file, seed_of, seeded_generator, sha256_of, staged_directory


def test_sha256_is_hashlib_s(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 300_000)
    assert sha256_of(path) == hashlib.sha256(b"x" * 300_000).hexdigest()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((7, "step", 3, "process", 1), "7 step 3 process 1"),
        ((7, "rounding", 3, "model.layers.0.mlp.experts.down_a"), "7 rounding 3 model.layers.0.mlp.experts.down_a"),
        (("stochastic rounding 0", "model.layers.1.mlp.experts.down_proj_blocks", 5),
         "stochastic rounding 0 model.layers.1.mlp.experts.down_proj_blocks 5"),
        ((7, "model.layers.0.self_attn.q_proj"), "7 model.layers.0.self_attn.q_proj"),
    ],
    ids=["dropout", "optimiser", "export", "adapter"],
)  # fmt: skip
def test_draws_are_those_of_every_earlier_form(words: tuple[object, ...], text: str) -> None:
    """The four places that made generators from hashes (v0.1.0) wrote these texts; runs must draw the same numbers."""
    digest = hashlib.sha256(text.encode()).digest()
    before = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    assert torch.equal(torch.rand(5, generator=seeded_generator(*words)), torch.rand(5, generator=before))
    assert seed_of(*words) == seed_of(text) != seed_of(text + "x")


def test_a_seed_is_the_start_of_a_published_hash() -> None:
    """SHA-256 of "abc" (FIPS 180-2) starts with ba7816bf 8f01cfea."""
    assert seed_of("abc") == int.from_bytes(bytes.fromhex("ba7816bf8f01cfea"), "little", signed=True) < 0


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    files.write_json(path, {"b": 1, "a": ["é"]})
    assert path.read_text(encoding="utf-8") == json.dumps({"b": 1, "a": ["é"]}, indent=2) + "\n"
    files.write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    files.write_bytes(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert os.listdir(path.parent) == ["file.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced_file(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        _ = 1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "above" / "adapter"
    with staged_directory(target, mode=0o700) as staging:
        (staging / "a").write_text("1")
        assert staging.name == "adapter.partial" and not target.exists()
    assert (target / "a").read_text() == "1" and os.listdir(target.parent) == ["adapter"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o700


def test_a_directory_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "adapter") as staging:
        (staging / "a").write_text("1")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    (tmp_path / "adapter.partial").mkdir()
    (tmp_path / "adapter.partial" / "half").write_text("")
    with staged_directory(tmp_path / "adapter") as staging:
        assert os.listdir(staging) == []


def test_an_existing_directory_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "step"
    target.mkdir()
    with staged_directory(target) as staging:  # empty
        (staging / "a").write_text("1")
    with pytest.raises(InputError, match="exists already"), staged_directory(target):
        pytest.fail("the block must not run")
    with pytest.raises(ZeroDivisionError), staged_directory(target, replace=True):
        _ = 1 / 0
    assert (target / "a").exists()
    with staged_directory(target, replace=True) as staging:
        (staging / "b").write_text("2")
    assert os.listdir(target) == ["b"]


class SafetensorError(Exception):
    """Stands for safetensors' class of this name."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_is_this_machine_s_fault(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(MachineError, match="cannot write the adapter to ") as caught,
        staged_directory(tmp_path / "adapter", "the adapter", fix="free some"),
    ):
        raise error
    assert caught.value.fix == "free some" and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"{", "not valid JSON"), (b"[1]", "list, not an object"), (b"\xff", "not valid JSON")],
)
def test_json_that_is_none_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_json(path, "a run's manifest", "start again")
    assert str(path) in caught.value.what
    assert caught.value.why == "it should be a run's manifest" and caught.value.fix == "start again"


def test_the_bottom_modules_do_not_import_torch() -> None:
    code = "import sys, finetune.arch, finetune.files, finetune.machine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
