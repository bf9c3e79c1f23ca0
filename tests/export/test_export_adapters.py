"""Adapter exports: each target's file against the layout oracle, and read by its serving code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from serving_layouts import READERS, assert_same_updates
from synthetic_adapter import EXPERTS, SIZES, write_synthetic
from test_adapters import BOTH, new_base, randomised, sample
from tolerances import log_probability_noise

from finetune.adapters.provenance import BaseRecord
from finetune.adapters.read_back import read_back
from finetune.adapters.store import AdapterFile, write_adapter
from finetune.cli.main import main
from finetune.export.adapters import export_adapter
from finetune.export.options import ExportOptions
from finetune.export.targets.peft import SERVED_RANKS
from finetune.model.build import Base
from finetune.model.forward import logits

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHILD = Path(__file__).with_name("foreign_logits.py")
IDS = [1, 200, 3000, 40000, 5, 77, 1234, 99999, 1000, 20, 30, 40]


def export(source: Path, target: str, out: Path, **options: object) -> Path:
    """Export without verification, which takes another process; test_export_adapter_check.py tests it."""
    options = {"verify": False} | options
    export_adapter(AdapterFile.open(source), target, out, ExportOptions(**options))  # type: ignore[arg-type]
    return out


sites = st.dictionaries(
    st.tuples(st.integers(0, 3), st.sampled_from(sorted(SIZES))),
    st.tuples(st.integers(1, 5), st.sampled_from([0.5, 1.0, 5.0, 16.0])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sites=sites, rslora=st.booleans(), target=st.sampled_from(sorted(READERS)), pad=st.booleans())
def test_every_target_has_the_same_update(
    sites: dict[tuple[int, str], tuple[int, float]], rslora: bool, target: str, pad: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Any ranks, alphas, rsLoRA, single projections and layer subsets."""
    directory = tmp_path_factory.mktemp("any")
    adapter = write_synthetic(directory / "adapter", sites, rslora=rslora)
    if target == "sglang":  # what cannot be known without the base: how wide k and v are
        sites_of_qkv = {name for _, name in sites} & {"q_proj", "k_proj", "v_proj"}
        if sites_of_qkv and (sites_of_qkv == {"q_proj"} or "q_proj" not in sites_of_qkv):
            return
    found = READERS[target](export(adapter.directory, target, directory / "out", pad_rank=pad))
    assert_same_updates(found, adapter)
    names_by_layer: dict[int, set[str]] = {}
    for layer, name in found:
        names_by_layer.setdefault(layer, set()).add(name)
    for names in names_by_layer.values():
        experts = names & {"gate_up_proj", "down_proj"}
        assert target == "gguf-lora" or len(experts) in (0, 2), "a lone expert projection loads as nothing"
        if target == "sglang":
            assert len(names & {"q_proj", "k_proj", "v_proj"}) in (0, 3)
    if target == "peft" and pad:
        stored = load_file(directory / "out" / "adapter_model.safetensors")
        ranks = {len(t) // (EXPERTS if "experts" in key else 1) for key, t in stored.items() if "lora_A" in key}
        assert len(ranks) == 1 and ranks <= set(SERVED_RANKS)


def test_keys_and_shapes_are_the_golden_lists(tmp_path: Path) -> None:
    """Committed lists, written by hand from the documentation; layer 0 whole, layer 3 with q and down alone."""
    whole = {(0, name): (3 if "p_proj" in name or "down" in name else 2, 4.0) for name in SIZES}
    adapter = write_synthetic(tmp_path / "adapter", whole | {(3, "q_proj"): (2, 4.0), (3, "down_proj"): (3, 4.0)})
    golden = json.loads((FIXTURES / "serving_layouts.json").read_text())
    for target in ("peft", "sglang"):
        out = export(adapter.directory, target, tmp_path / target)
        stored = load_file(out / "adapter_model.safetensors")
        assert {key: list(tensor.shape) for key, tensor in stored.items()} == golden[target]["tensors"]
        config = json.loads((out / "adapter_config.json").read_text())
        assert golden[target]["config"].items() <= config.items()
        assert sorted(path.name for path in out.iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors", "export.json", "finetune.json"
        ], "an adapter's directory carries no tokenizer"  # fmt: skip


# ---- read by those who serve it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Base]:
    """A trained-like adapter of the tiny base, rank 6 on attention and 3 on experts, and the base with it attached."""
    base = new_base(tiny_base)
    directory = tmp_path_factory.mktemp("live") / "adapter"
    adapter = randomised(base, BOTH)
    write_adapter(directory, adapter, BOTH, BaseRecord(str(tiny_base), None, base.identity))
    return directory, base


def test_stock_peft_reads_the_padded_export(live: tuple[Path, Base], tiny_base: Path, tmp_path: Path) -> None:
    directory, _ = live
    out = export(directory, "peft", tmp_path / "out", pad_rank=True, base=str(tiny_base))
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    base = new_base(tiny_base)
    result = read_back(base, randomised(base, BOTH), out, [sample()])
    assert result.max_difference <= result.limit
    assert result.limit < 1e-2
    assert result.effect > 1


def foreign(kind: str, base: Path, adapter: Path | None, out: Path) -> np.ndarray:
    paths = [sys.executable, CHILD, kind, base, adapter or "", json.dumps(IDS), out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(p) for p in paths], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out)


@pytest.fixture(scope="module")
def reference(
    live: tuple[Path, Base], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray]:
    """A base that mlx-lm and llama.cpp understand as transformers does, and stock PEFT's log-probabilities on it.

    Both ignore YaRN's `truncate: false`, so the comparison is made with true.
    """
    directory = tmp_path_factory.mktemp("truncated")
    base = directory / "base"
    shutil.copytree(tiny_base, base)
    (base / "checksums.json").unlink()
    config = (base / "config.json").read_text()
    assert '"truncate": false' in config
    (base / "config.json").write_text(config.replace('"truncate": false', '"truncate": true'))
    return base, foreign("peft", base, live[0], directory / "peft.npy")


def test_mlx_lm_computes_the_same(live: tuple[Path, Base], reference: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    base, wanted = reference
    out = export(live[0], "mlx", tmp_path / "out")
    found = foreign("mlx", base, out, tmp_path / "mlx.npy")
    model = live[1].model
    limit = log_probability_noise(model, lambda: logits(model, torch.tensor(IDS)))
    assert np.abs(found - wanted).max() <= limit < 1e-2
    without = foreign("mlx", base, None, tmp_path / "base.npy")
    assert np.abs(without - wanted).max() > 1, "an adapter that was left out would show"


def test_llama_cpp_computes_the_same(
    live: tuple[Path, Base], reference: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    from tiny_gguf import write_float32_gguf

    base, wanted = reference
    write_float32_gguf(base, tmp_path / "base.gguf")
    out = export(live[0], "gguf-lora", tmp_path / "out")
    found = foreign("llama", tmp_path / "base.gguf", out / "adapter.gguf", tmp_path / "llama.npy")
    assert np.abs(found[:, 1] - wanted[-1, found[:, 0].astype(int)]).max() < 0.01
    without = foreign("llama", tmp_path / "base.gguf", None, tmp_path / "plain.npy")
    assert np.abs(without[:, 1] - wanted[-1, without[:, 0].astype(int)]).max() > 1


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_synthetic(tmp_path / "small", {(0, "q_proj"): (2, 4.0), (0, "down_proj"): (3, 4.0)}).directory


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_impossible_exports_are_refused_with_the_reason(
    small: Path, live: tuple[Path, Base], tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def refused(code: int, words: str, *arguments: object) -> None:
        assert run(*arguments) == code
        assert words in capfd.readouterr().err
        assert not out.exists() and not list(tmp_path.glob("*.partial"))

    refused(3, "SGLang wants q, k and v together", "export", small, "--to", "sglang", "--out", out)
    refused(3, "the base has", "export", small, "--to", "mlx", "--base", tiny_base, "--out", out)
    refused(2, "did you mean mlx", "export", small, "--to", "mlxx", "--out", out)
    other = tmp_path / "other_base"
    shutil.copytree(tiny_base, other)
    (other / "checksums.json").unlink()
    shard = other / "model-00003-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    refused(3, "trained on another base", "export", live[0], "--to", "peft", "--base", other, "--out", out)
    high = write_synthetic(tmp_path / "high", {(0, "q_proj"): (600, 4.0)}).directory
    refused(3, "the highest that vLLM serves", "export", high, "--to", "peft", "--pad-rank", "--out", out)
    router = tmp_path / "router"
    shutil.copytree(small, router)
    tensors = load_file(router / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.mlp.router"
    tensors |= {f"{path}.lora_A.weight": torch.ones(77, 8), f"{path}.lora_B.weight": torch.ones(3, 77)}
    save_file(tensors, router / "adapter_model.safetensors")
    refused(3, "adapts the router", "export", router, "--to", "sglang", "--out", out)
    weights = small / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    refused(3, "truncated", "export", small, "--to", "peft", "--out", out)
    flipped = tmp_path / "flipped"
    shutil.copytree(live[0], flipped)
    damaged = bytearray((flipped / "adapter_model.safetensors").read_bytes())
    damaged[-9] ^= 4
    (flipped / "adapter_model.safetensors").write_bytes(damaged)
    refused(3, "SHA-256 differs", "export", flipped, "--to", "peft", "--out", out)
    weights.write_bytes(whole)
    out.mkdir()
    assert run("export", small, "--to", "peft", "--out", out) == 2
    assert "exists already" in capfd.readouterr().err and not list(out.iterdir())


def test_a_failed_write_leaves_nothing(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.errors import MachineError

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.export.adapters.save_file", full)
    with pytest.raises(MachineError, match="No space left"):
        export(small, "mlx", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_dry_run_and_serving_lines(
    small: Path, live: tuple[Path, Base], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("export", small, "--to", "mlx", "--out", tmp_path / "out", "--dry-run") == 0
    printed = capfd.readouterr().out
    assert "model.layers.0.mlp.experts.gate_proj.lora_a 3x3x8" in printed and "num_layers: -1" in printed
    assert not (tmp_path / "out").exists()
    export(live[0], "peft", tmp_path / "peft")
    export(live[0], "peft", tmp_path / "runs" / "my-run" / "export" / "peft")
    export(live[0], "sglang", tmp_path / "sglang")
    lines = capfd.readouterr().err
    assert "--enable-lora --max-lora-rank 8 --lora-modules peft=" in lines
    assert "--lora-modules my-run=" in lines
    assert "--moe-runner-backend triton" in lines and "bfloat16 experts only" in lines
