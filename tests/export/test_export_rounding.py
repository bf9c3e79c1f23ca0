"""`--rounding` end to end: a trained run merged to MXFP4, read by third-party code, resumed, judged; and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tolerances import log_probability_noise
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from finetune.adapters.store import WEIGHTS, AdapterFile
from finetune.arch import Arch
from finetune.cli.main import main
from finetune.config.schema import ExportConfig
from finetune.config.validate import load_run_config
from finetune.data.dataset import load_split
from finetune.data.harmony.tokenizer import check_tokenizer
from finetune.errors import CheckError, InputError
from finetune.export.plan import plan_merge
from finetune.export.survival.effect import Effect, VariantFigures, compare_with_thresholds, require_kept
from finetune.export.survival.variants import Variants
from finetune.export.verify import compare_weights
from finetune.model.build import LayerStream, build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import hidden_states
from finetune.model.noise import rounding_noise
from finetune.rounding.calibration import (
    check_belongs,
    choose_calibration,
    draw_examples,
    tokens_wanted,
)
from finetune.rounding.merge import Tally, checksum
from finetune.rounding.results import RoundedExperts

CPU = torch.device("cpu")
EXPERTS = "model.layers.{}.mlp.experts.{}_proj"


@pytest.fixture(scope="module")
def run(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose export has no limits on losses, so that tests set them."""
    directory = tmp_path_factory.mktemp("rounding") / "run"
    shutil.copytree(finished[0], directory)
    set_export(directory, min_gain_kept=0.0, max_gain_kept=9.0, max_kl_share=1.0, survival_examples=4)
    return directory


def set_export(run: Path, **keys: float) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["export"] |= keys
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def merged(run: Path) -> tuple[Path, dict[str, Any]]:
    """The default export, verified, and its export.json."""
    assert main(["export", str(run), "--to", "mxfp4"]) == 0
    out = run / "export" / "mxfp4"
    return out, json.loads((out / "export.json").read_text())


def base_of(run: Path) -> Checkpoint:
    return Checkpoint.open(Path(load_run_config(run / "config.yaml").model.path))


def test_the_default_merge_is_compensated_verified_and_measured(merged: tuple[Path, dict[str, Any]], run: Path) -> None:
    out, facts = merged
    survival = facts["survival"]
    assert survival["rounding"] == "compensated" and not list(run.glob("export/.mxfp4*"))
    for name, figures in survival["tensors"].items():
        assert len(figures["experts"]) == 8 and figures["outputs"]["rounded"] + figures["outputs"]["untouched"] == 8
        assert f"{name}_bias" in facts["updates"]
    compared = facts["verification"]["logits"]
    assert compared["merged"]["max_difference"] <= compared["limit"]  # transformers against our own reader
    assert compared["limit"] < 1e-2
    table = survival["end_to_end"]["variants"]
    assert table["adapter"]["kl"] == pytest.approx(0, abs=1e-6) and table["adapter"]["gain_kept"] == pytest.approx(1)
    assert table["base"]["gain_kept"] == 0 and table["bf16"]["kl_removed"] > 0.9
    assert table["compensated"]["kl"] < table["nearest"]["kl"]
    before, after = base_of(run), Checkpoint.open(out)
    changed = {name for name in before.names() if not torch.equal(before.read(name), after.read(name))}
    stems = {EXPERTS.format(n, p) for n in (0, 1) for p in ("gate_up", "down")}
    assert {f"{stem}_blocks" for stem in stems} <= changed
    allowed = {f"{stem}_{end}" for stem in stems for end in ("blocks", "scales", "bias")}
    assert all(name in allowed or ".self_attn." in name for name in changed)
    assert json.loads((run / "survival-mxfp4.json").read_text())["end_to_end"] == survival["end_to_end"]


def test_the_same_command_writes_the_same_bytes(merged: tuple[Path, dict[str, Any]], run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["export", str(run), "--to", "mxfp4", "--out", str(again), "--no-verify"]) == 0
    for path in merged[0].glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_kill_between_layers_costs_one_layer(merged: tuple[Path, dict[str, Any]], run: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from finetune.rounding.results import RoundedExperts\nfrom finetune.cli.main import main\n"
        "add = RoundedExperts.add\n"
        "def killed(self, layer, result):\n"
        "    if layer == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(self, layer, result)\n"
        "RoundedExperts.add = killed; main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    command = ["export", str(run), "--to", "mxfp4", "--out", str(out), "--no-verify"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL and not out.exists()
    kept = tmp_path / ".out.rounded.partial" / "layer-000.safetensors"
    written = kept.stat().st_mtime_ns
    rounded = RoundedExperts.beside(out, json.loads((kept.parent / "progress.json").read_text())["key"])
    assert rounded.has(0) and not rounded.has(1) and kept.stat().st_mtime_ns == written
    assert main(command) == 0 and not kept.exists()
    for path in merged[0].glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_an_update_of_zero_changes_no_byte(run: Path, tmp_path: Path) -> None:
    zero = tmp_path / "run"
    shutil.copytree(run, zero, ignore=shutil.ignore_patterns("export", "checkpoints"))
    (zero / "adapter" / "finetune.json").unlink()
    tensors = load_file(zero / "adapter" / WEIGHTS)
    save_file({k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}, zero / "adapter" / WEIGHTS)
    out = tmp_path / "out"
    assert main(["export", str(zero), "--to", "mxfp4", "--out", str(out), "--no-verify"]) == 0
    base = base_of(run).directory
    for path in base.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow  # the tokenizer alone takes a minute
@pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf (extra `dev`)")
def test_a_gguf_file_holds_the_same_experts(merged: tuple[Path, dict[str, Any]], run: Path, tmp_path: Path) -> None:
    import gguf

    out = tmp_path / "gguf"
    assert main(["export", str(run), "--to", "gguf", "--gguf-experts", "mxfp4", "--out", str(out)]) == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(next(out.glob("*.gguf"))).tensors}
    native = Checkpoint.open(merged[0])
    from finetune.mxfp4.format import dequantise

    for layer in (0, 1):
        stem = EXPERTS.format(layer, "gate_up")
        values = dequantise(native.read(f"{stem}_blocks"), native.read(f"{stem}_scales"), torch.float32)
        for start, half in enumerate(("gate", "up")):
            stored = tensors[f"blk.{layer}.ffn_{half}_exps.weight"]
            found = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
            assert torch.equal(found, values[:, start::2])
            bias = torch.from_numpy(np.array(tensors[f"blk.{layer}.ffn_{half}_exps.bias"].data))
            assert torch.equal(bias, native.read(f"{stem}_bias")[:, start::2].float())


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="needs mlx[cpu] and mlx-lm (extra `dev`)")
def test_mlx_lm_reads_it(merged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from test_export_runtimes import foreign, in_transformers, log_probabilities, logits_of, truncating

    theirs = foreign("mlx", merged[0], tmp_path / "mlx.npy")
    model = in_transformers(truncating(merged[0], tmp_path / "truncating"))
    limit = log_probability_noise(model, lambda: logits_of(model))
    assert np.abs(theirs - log_probabilities(model)).max() <= limit < 1e-2


def test_the_verification_finds_changed_bytes(merged: tuple[Path, dict[str, Any]], run: Path, tmp_path: Path) -> None:
    out, facts = merged
    bad = tmp_path / "bad"
    shutil.copytree(out, bad)
    stem = EXPERTS.format(1, "down")
    shard = next(path for path in bad.glob("*.safetensors") if f"{stem}_blocks" in load_file(path))
    tensors = load_file(shard)
    tensors[f"{stem}_blocks"][3, 5] ^= 0x77  # one row of one expert, every code another
    tensors[f"{stem}_bias"][2] += 0.5
    save_file(tensors, shard, metadata={"format": "pt"})
    plan = plan_merge(base_of(run), AdapterFile.open(run / "adapter"), "mxfp4", "compensated")
    sums = {name: Tally(wanted=norm**2) for name, norm in facts["updates"].items()}
    for name, figures in facts["survival"]["tensors"].items():
        tally = sums[f"{name}_blocks"]
        tally.kept, tally.missed = figures["survival"] * tally.wanted, figures["error"] ** 2 * tally.wanted
    assert compare_weights(plan, "mxfp4", out, sums).problems == {}
    problems = compare_weights(plan, "mxfp4", bad, sums).problems
    assert problems.keys() == {stem, f"{stem}_bias"}


def test_the_verification_finds_one_wrong_code(merged: tuple[Path, dict[str, Any]], run: Path, tmp_path: Path) -> None:
    """One code off by one: the kept and missed shares hardly change."""
    out, facts = merged
    stem = EXPERTS.format(0, "gate_up")
    good = Checkpoint.open(out)
    values = convert_moe_packed_tensors(good.read(f"{stem}_blocks"), good.read(f"{stem}_scales"), dtype=torch.float32)
    sums = {name: Tally(wanted=norm**2) for name, norm in facts["updates"].items()}
    for name, figures in facts["survival"]["tensors"].items():
        tally = sums[f"{name}_blocks"]
        tally.kept, tally.missed = figures["survival"] * tally.wanted, figures["error"] ** 2 * tally.wanted
    sums[f"{stem}_blocks"].checksum = (
        sum(checksum(values[expert].T[None], expert) for expert in range(len(values))) % 2**64
    )
    bad = tmp_path / "bad"
    shutil.copytree(out, bad)
    shard = next(path for path in bad.glob("*.safetensors") if f"{stem}_blocks" in load_file(path))
    tensors = load_file(shard)
    tensors[f"{stem}_blocks"][2, 5, 0, 3] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    plan = plan_merge(base_of(run), AdapterFile.open(run / "adapter"), "mxfp4", "compensated")
    assert compare_weights(plan, "mxfp4", out, sums).problems == {}
    assert "not those" in compare_weights(plan, "mxfp4", bad, sums).problems[stem]


def test_running_layer_by_layer_equals_the_model(run: Path) -> None:
    checkpoint = base_of(run)
    examples = load_split(load_run_config(run / "config.yaml").data, "train").examples
    batch = draw_examples(examples, 600, 700, 0, 201_088).batches[0]
    base = build_base(checkpoint, CPU, torch.float32, experts_per_chunk=4)
    stream = LayerStream(checkpoint, CPU, torch.float32, 4)
    hidden = stream.embed(batch.input_ids)
    for number in range(checkpoint.arch.num_layers):
        hidden = stream.run(stream.read(number), number, hidden, batch.positions, batch.segments)
    with torch.no_grad():
        whole = partial(hidden_states, base.model, batch.input_ids, batch.positions, batch.segments)
        limit = rounding_noise(base.model, whole)
        assert (base.model.model.norm(hidden) - whole()).abs().max() <= limit
        assert limit < 1e-2


def test_the_base_is_restored_after_measuring_every_variant(merged: tuple[Path, dict[str, Any]], run: Path) -> None:
    """The bf16 variant equals the bf16 export: the same weights, so the same logits."""
    checkpoint = base_of(run)
    base = build_base(checkpoint, CPU, torch.float32, experts_per_chunk=4)
    plan = plan_merge(checkpoint, AdapterFile.open(run / "adapter"), "mxfp4", "nearest")
    ids = torch.arange(1000, 1040)[None]
    places, segments = torch.arange(40)[None], torch.zeros(1, 40, dtype=torch.long)

    @torch.no_grad()
    def states(model: Any) -> torch.Tensor:
        return hidden_states(model, ids, places, segments)

    before = states(base.model)
    variants = Variants(base, plan, None)
    found = {}
    for name in variants.names():
        variants.become(name)
        found[name] = states(base.model)
    variants.become("base")
    assert torch.equal(states(base.model), before) and torch.equal(found["base"], before)
    distance = {name: float((state - found["adapter"]).norm()) for name, state in found.items()}
    assert distance["bf16"] < 0.2 * distance["base"] and distance["adapter"] == 0
    out = run / "export" / "nearest-for-variants"
    assert main(["export", str(run), "--to", "mxfp4", "--rounding", "nearest", "--out", str(out), "--no-verify"]) == 0
    written = build_base(Checkpoint.open(out), CPU, torch.float32, experts_per_chunk=4)
    assert torch.equal(states(written.model), found["nearest"])


# --- judging


def effect(gain_kept: float, kl_removed: float, gain: float = 1.0) -> Effect:
    perfect = VariantFigures(1.0, 0.0, None, None, 1.0, (1.0, 1.0), 1.0)
    written = replace(perfect, kl=1 - kl_removed, gain_kept=gain_kept, kl_removed=kl_removed)
    variants = {"compensated": written, "adapter": perfect, "bf16": perfect}
    return Effect(9, "test", 0, 0.95, gain, (gain - 0.5, gain + 0.5), variants)


@pytest.mark.parametrize(
    ("kept", "removed", "reasons"), [(0.97, 0.8, 0), (0.89, 0.8, 1), (1.06, 0.8, 1), (1.5, -0.56, 2), (0.97, 0.4, 1)]
)
def test_a_merge_is_judged_by_gain_and_by_kl(kept: float, removed: float, reasons: int) -> None:
    measured = effect(kept, removed)
    verdict = compare_with_thresholds(measured, "compensated", ExportConfig())
    assert len(verdict.reasons) == reasons and verdict.kept == (reasons == 0)
    measured = replace(measured, verdict=verdict)
    if reasons:
        with pytest.raises(CheckError, match="lost the fine-tune") as caught:
            require_kept(measured, "compensated")
        assert caught.value.exit_code == 6 and "merged, bf16 (100% of the gain" in str(caught.value)
    else:
        require_kept(measured, "compensated")


def test_an_insignificant_gain_is_not_judged_but_kl_is() -> None:
    verdict = compare_with_thresholds(effect(0.2, 0.8, gain=0.1), "compensated", ExportConfig())
    assert verdict.kept and "cannot be distinguished from zero" in verdict.notes[0]
    assert not compare_with_thresholds(effect(0.2, 0.1, gain=0.1), "compensated", ExportConfig()).kept


def test_an_export_that_loses_the_fine_tune_exits_6_and_keeps_its_unfinished_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = tmp_path / "run"
    shutil.copytree(run, strict, ignore=shutil.ignore_patterns("export", "checkpoints"))
    set_export(strict, max_kl_share=0.0)
    command = ["export", str(strict), "--to", "mxfp4", "--rounding", "nearest", "--no-verify"]
    assert main(command) == 6
    message = capsys.readouterr().err
    assert "the merge lost the fine-tune" in message and "base + adapter (100% of the gain" in message
    assert not (strict / "export" / "mxfp4").exists()
    assert json.loads((strict / "survival-mxfp4.json").read_text())["end_to_end"]["verdict"]["kept"] is False


# --- bad input


def test_an_adapter_without_calibration_records_suggests_a_fix(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapter), "--to", "mxfp4", "--out", str(adapter.with_name("nowhere"))]) == 2
    message = capsys.readouterr().err
    assert "belongs to no run" in message and "--calibration" in message
    assert not adapter.with_name("nowhere").exists() and not list(adapter.parent.glob(".nowhere*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "bf16", "--rounding", "nearest"], "does nothing here: experts stay in bfloat16"),
        (["--to", "mxfp4", "--rounding", "nearest", "--calibration", "quickstart"], "compensated rounding alone"),
    ],
)
def test_options_without_effect_are_refused(
    arguments: list[str], message: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapter), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_calibration_records_of_another_tokenizer_base_or_training_set_are_refused(
    run: Path, small_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="another tokenizer than gpt-oss's"):
        check_tokenizer(small_base, refuse=True)
    check_tokenizer(base_of(run).directory, refuse=True)
    config = load_run_config(run / "config.yaml")
    samples = load_split(config.data, "train").examples
    with pytest.raises(InputError, match="the base has 512 tokens"):
        draw_examples(samples, 600, 700, 0, 512)
    manifest = json.loads((run / "manifest.json").read_text())
    identity, data = manifest["base"]["identity"], manifest["data"]["train"]["fingerprint"]
    check_belongs(None, run, identity, data)
    with pytest.raises(InputError, match="trained over another base"):
        check_belongs(None, run, "0" * 64, data)
    with pytest.raises(InputError, match="have changed since it was trained"):
        check_belongs(None, run, identity, "0" * 64)
    one, fingerprint = choose_calibration(config, base_of(run), 2000)
    other, _ = choose_calibration(config, base_of(run), 2000)
    assert one.fingerprint == other.fingerprint and fingerprint == data and one.num_tokens >= 2000


@pytest.mark.parametrize(("size", "tokens"), [("20b", 92_160), ("120b", 368_640)])
def test_calibration_tokens_of_the_published_models(size: str, tokens: int) -> None:
    from finetune.config.paths import shipped_dir

    config = json.loads((shipped_dir("data") / "tokenizer" / f"gpt-oss-{size}" / "config.json").read_text())
    assert tokens_wanted(Arch.from_config(config, "config.json")) == tokens
