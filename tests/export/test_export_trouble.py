"""Merged exports when something goes wrong: failed checks, bad input, full disks, kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging import GATE_UP, without_provenance

from finetune.adapters.store import WEIGHTS, AdapterFile
from finetune.cli.main import main
from finetune.errors import InputError
from finetune.export import execute
from finetune.export.options import ExportOptions
from finetune.export.targets.merged import export_merged
from finetune.files import sha256_of
from finetune.kernels.experts import LoraFactors
from finetune.model.checkpoint import Checkpoint
from finetune.model.identity import verify_checksums
from finetune.resumable import ResumableDirectory

NEAREST = ("--rounding", "nearest")


def test_a_failed_verification_exits_6_and_keeps_the_unfinished_name(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(blocks: torch.Tensor, scales: torch.Tensor, factors: LoraFactors | None, **kind: bool) -> object:
        stronger = None if factors is None else LoraFactors(factors.a, factors.b, factors.scale * 1.01)
        return right(blocks, scales, stronger, **kind)

    right = execute.add_to_experts
    monkeypatch.setattr(execute, "add_to_experts", wrong)
    out = tmp_path / "out"
    assert main(["export", str(adapter), "--to", "bf16", "--out", str(out)]) == 6
    assert "mlp.experts" in capsys.readouterr().err
    assert not out.exists()
    facts = json.loads((tmp_path / ".out.partial" / "export.json").read_text())
    assert "mlp.experts" in facts["verification"]["failed"]


# --- bad input and interruptions


def export(adapter: Path, out: Path, target: str = "mxfp4", **options: object) -> None:
    export_merged(
        AdapterFile.open(adapter),
        target,
        out,
        ExportOptions(verify=False, rounding="nearest" if target == "mxfp4" else None, **options),
        None,
    )  # type: ignore[arg-type]


def test_an_existing_target_is_unchanged(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    assert main(["export", str(adapter), "--to", "bf16", "--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine").read_text() == "keep" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bit flip in the base", "another base.*"),
        ("truncated base", "truncated"),
        ("another shape", "updates 8 experts of 96 x 64, the base has 8 experts of 192 x 64"),
        ("another layer", "adapts model.layers.7.self_attn.q_proj, which the base has not"),
        ("not finite", "not finite"),
        ("truncated adapter", "is not the file that was written"),
        ("unknown key", "is not a key of PEFT's gpt-oss layout"),
        ("no base", "there is no directory"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    damage: str, message: str, adapter: Path, small_base: Path, tmp_path: Path
) -> None:
    base, source = tmp_path / "base", adapter
    prefix = "base_model.model.model.layers."
    if "base" in damage:
        shutil.copytree(small_base, base)
    else:
        base = small_base

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = f"{prefix}0.self_attn.q_proj.lora_B.weight"
        match damage:
            case "another shape":
                key = f"{prefix}1.mlp.experts.base_layer.lora_B.weight"
                tensors[key] = tensors[key][:96].contiguous()
            case "another layer":
                for factor in "AB":
                    name = f"0.self_attn.q_proj.lora_{factor}.weight"
                    tensors[f"{prefix}{name.replace('0', '7', 1)}"] = tensors[prefix + name].clone()
            case "not finite":
                tensors[key][0, 0] = float("inf")
            case "unknown key":
                tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 2)

    shard = base / "model-00002-of-00003.safetensors"
    match damage:
        case "bit flip in the base":
            content = bytearray(shard.read_bytes())
            content[-1000] ^= 1
            shard.write_bytes(content)
        case "truncated base":
            shard.write_bytes(shard.read_bytes()[:-10])
        case "truncated adapter":
            source = tmp_path / "cut"
            shutil.copytree(adapter, source)
            (source / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-10])
        case "no base":
            shutil.rmtree(base)
        case _:
            source = without_provenance(adapter, tmp_path / "changed", change)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        export(source, tmp_path / "out", base=str(base))
    assert {path.name for path in tmp_path.iterdir()} == before


def test_too_small_a_disk_is_detected_before_writing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert main(["export", str(adapter), "--to", "bf16", "--out", str(tmp_path / "out")]) == 5
    assert "more bytes" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_finished_shards(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_rows, read, full = Checkpoint.read_rows, set(), True

    def reading(self: Checkpoint, name: str, first: int, last: int) -> torch.Tensor:
        if full and name == "lm_head.weight":
            raise OSError(28, "No space left on device")
        read.add(name)
        return read_rows(self, name, first, last)

    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    monkeypatch.setattr(Checkpoint, "read_rows", reading)
    command = ["export", str(adapter), "--to", "mxfp4", "--out", str(out), "--no-verify", *NEAREST]
    assert main(command) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial"]
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]
    assert sorted(path.name for path in partial.iterdir()) == [*shards, "progress.json"]
    damaged = bytearray((partial / shards[1]).read_bytes())  # a finished shard that rots is made again
    damaged[-1] ^= 1
    (partial / shards[1]).write_bytes(damaged)
    full = False
    read.clear()
    assert main(command) == 0
    assert "model.embed_tokens.weight" not in read and f"{GATE_UP}_blocks" in read
    assert verify_checksums(Checkpoint.open(out)) and not partial.exists()


def test_a_killed_export_is_not_complete_and_the_next_call_resumes_it(
    exported: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    """SIGKILL in the second shard, then the same command: every weight file as in an undisturbed export."""
    code = (
        "import os, signal, sys; from finetune.cli.main import main\n"
        "from finetune.model.checkpoint import Checkpoint\n"
        "read_rows = Checkpoint.read_rows\n"
        "def killed(self, name, first, last):\n"
        f"    if name == '{GATE_UP}_scales': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read_rows(self, name, first, last)\n"
        "Checkpoint.read_rows = killed; main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    command = ["export", str(adapter), "--to", "mxfp4", "--out", str(out), "--no-verify", *NEAREST]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    partial = tmp_path / ".out.partial"
    assert not out.exists() and not (partial / "config.json").exists()
    assert (partial / "model-00002-of-00003.safetensors.half").exists()
    first = (partial / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "model-00001-of-00003.safetensors").stat().st_mtime_ns == first
    for path in exported("mxfp4").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_shards_of_another_export_are_not_reused(tmp_path: Path) -> None:
    first = ResumableDirectory(tmp_path / "out", "key")
    first.unfinished("a").write_bytes(b"1")
    first.finish("a", {"sha256": sha256_of(first.unfinished("a"))})
    assert ResumableDirectory(tmp_path / "out", "key").files.keys() == {"a"}
    assert not ResumableDirectory(tmp_path / "out", "another").files and not (first.path / "a").exists()
