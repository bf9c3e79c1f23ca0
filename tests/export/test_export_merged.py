"""Merged exports: arithmetic, the files written, and the model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging import GATE_UP, IDS, without_provenance, zero_b
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Mxfp4Config

from finetune.adapters.config_file import PeftConfig
from finetune.adapters.provenance import BaseRecord
from finetune.adapters.store import AdapterFile
from finetune.arch import Arch
from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.paths import shipped_dir
from finetune.config.validate import dump_yaml
from finetune.data.dataset import load_split
from finetune.data.harmony.chat_template import chat_template
from finetune.export.companions import companions
from finetune.export.plan import plan_merge
from finetune.kernels.experts import LoraFactors
from finetune.model.checkpoint import Checkpoint
from finetune.model.identity import verify_checksums
from finetune.model.noise import rounding_noise
from finetune.mxfp4.format import dequantise
from finetune.rounding.nearest import round_experts

NEAREST = ("--rounding", "nearest")


# --- arithmetic


def random_packed(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)  # -0 among the codes
    return blocks, torch.randint(115, 130, shape, generator=generator, dtype=torch.uint8)


def test_rounding_an_update_of_zero_changes_no_byte() -> None:
    blocks, scales = random_packed(0, 2, 40, 3)
    none = LoraFactors(torch.randn(2, 4, 96), torch.zeros(2, 40, 4), 1.0)
    new_blocks, new_scales, tally = round_experts(blocks, scales, none)
    assert torch.equal(new_blocks, blocks) and torch.equal(new_scales, scales)
    assert tally.changed == 0 and tally.survival == 1.0


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.1, 3.0])
def test_rounding_is_nearest_and_never_further_than_the_base(size: float) -> None:
    """Oracle: float64 and every code of the block's scale, tried one by one."""
    blocks, scales = random_packed(1, 2, 48, 4)
    a, b = torch.randn(2, 3, 128), torch.randn(2, 48, 3) * size
    new_blocks, new_scales, tally = round_experts(blocks, scales, LoraFactors(a, b, 0.7))
    before = dequantise(blocks, scales, torch.float32).double().unflatten(-1, (-1, 32))
    after = dequantise(new_blocks, new_scales, torch.float32).double().unflatten(-1, (-1, 32))
    update = (0.7 * (b.double() @ a.double())).unflatten(-1, (-1, 32))
    target = before + update
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    steps = torch.exp2(scales.double() - 127)[..., None, None] * torch.cat((codes, -codes))
    best = (steps - target[..., None]).abs().amin(-1)
    kept = (new_scales == scales)[..., None]
    assert ((after - target).abs() <= best + 1e-6 * target.abs().max())[kept.expand_as(best)].all()
    error, error_before = (after - target).square().sum(-1), update.square().sum(-1)
    assert (error <= error_before * (1 + 1e-5)).all()
    fits = target.abs().amax(-1) <= 6 * torch.exp2(scales.double() - 127)
    assert (new_scales == scales)[fits].all()
    change = after - before
    assert tally.survival == pytest.approx(float((change * update).sum() / update.square().sum()), rel=1e-4)
    assert tally.error == pytest.approx(float((change - update).norm() / update.norm()), rel=1e-4)


@pytest.mark.parametrize(("size", "total"), [("20b", 41_829_514_368), ("120b", 233_658_313_344)])
def test_planned_bytes_of_the_published_models(size: str, total: int, adapter: Path) -> None:
    config = json.loads((shipped_dir("data") / "tokenizer" / f"gpt-oss-{size}" / "config.json").read_text())
    checkpoint = Checkpoint(Path("nowhere"), config, Arch.from_config(config, "config.json"), {})
    source = AdapterFile(adapter, PeftConfig({}), BaseRecord(), ())
    plan = plan_merge(checkpoint, source, "bf16")
    assert plan.num_bytes == total
    assert max(shard.num_bytes for shard in plan.shards) <= 5_000_000_000
    assert sorted(json.loads(plan.index())["weight_map"]) == sorted(op.name for op in plan.operations)


# --- files


def dequantised(base: Path) -> torch.nn.Module:
    packed = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=packed, attn_implementation="eager"
    ).float()


def made_by_peft(base: Path, to: Path) -> Path:
    """Adapters that this project never trains: rsLoRA with patterns, single projections, some layers, the router."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=r".*layers\.1\.self_attn\.(q|v)_proj",
        target_parameters=[
            "layers.0.mlp.experts.gate_up_proj",
            "layers.1.mlp.experts.down_proj",
            "0.mlp.router.weight",
        ],
        rank_pattern={"layers.1.mlp.experts.down_proj": 2},
        alpha_pattern={"layers.0.mlp.experts.gate_up_proj": 9},
        init_lora_weights=False,
    )
    torch.manual_seed(5)
    model = get_peft_model(dequantised(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(to, save_embedding_layers=False)
    return to


@pytest.mark.parametrize("maker", ["this toolkit", "peft"])
def test_bf16_equals_pefts_merge(
    maker: str, exported: Callable[..., Path], adapter: Path, small_base: Path, tmp_path: Path
) -> None:
    """Oracle: transformers' dequantised base in float32, PEFT's own merge, one cast."""
    if maker == "peft":
        adapter, out = made_by_peft(small_base, tmp_path / "peft"), tmp_path / "out"
        command = ["export", str(adapter), "--to", "bf16", "--out", str(out), "--base", str(small_base)]
        assert main(command) == 0
        assert json.loads((out / "export.json").read_text())["verification"]["weights"]["tensors_changed"] == 5
    else:
        out = exported("bf16")
    merged = PeftModel.from_pretrained(dequantised(small_base), adapter).merge_and_unload()
    ours, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = merged.state_dict()
    for name, tensor in ours.state_dict().items():
        expected = theirs[name].to(torch.bfloat16)
        apart = (tensor.float() - expected.float()).abs()  # sums in another order: a step of bfloat16 at a tie
        assert (apart <= expected.float().abs() * 2**-7 + 1e-6).all() and (apart > 0).float().mean() < 1e-3, name
    with torch.no_grad():
        ids = torch.tensor([IDS])
        merged.load_state_dict(ours.state_dict())  # what is left to differ is how config.json is read
        difference = ours.float()(input_ids=ids).logits - merged(input_ids=ids).logits
        assert difference.abs().max() <= rounding_noise(ours, lambda: ours(input_ids=ids).logits) < 1e-2


def test_merged_directories_include_the_bases_files(exported: Callable[..., Path], small_base: Path) -> None:
    shards = {path.name for path in small_base.glob("*.safetensors*")}
    for target in ("bf16", "mxfp4"):
        out = exported(target)
        for path in small_base.iterdir():
            if path.name in shards | {"README.md", "checksums.json", "config.json"}:
                continue
            assert (out / path.name).read_bytes() == path.read_bytes()
        assert (out / "BASE_README.md").read_bytes() == (small_base / "README.md").read_bytes()
        with_checksums = {path.name for path in out.iterdir()} - {"export.json", "checksums.json"}
        assert set(json.loads((out / "checksums.json").read_text())["files"]) == with_checksums
    original = json.loads((small_base / "config.json").read_text())
    assert json.loads((exported("mxfp4") / "config.json").read_text()) == original
    del original["quantization_config"]
    assert json.loads((exported("bf16") / "config.json").read_text()) == original
    assert verify_checksums(Checkpoint.open(exported("mxfp4")))


def test_an_mxfp4_merge_changes_no_other_bytes(exported: Callable[..., Path], small_base: Path) -> None:
    before, after = Checkpoint.open(small_base), Checkpoint.open(exported("mxfp4"))
    assert before.names() == after.names()
    changed = {name for name in before.names() if not torch.equal(before.read(name), after.read(name))}
    attention = {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qkvo"}
    experts = {f"model.layers.{n}.mlp.experts.{p}_proj_blocks" for n in (0, 1) for p in ("gate_up", "down")}
    assert attention | experts <= changed
    assert changed <= attention | experts | {name.replace("_blocks", "_scales") for name in experts}
    survival = json.loads((exported("mxfp4") / "export.json").read_text())["survival"]
    assert set(survival["tensors"]) == {name.removesuffix("_blocks") for name in experts}
    assert 0 < survival["overall"]["survival"] < 1


def test_an_update_of_zero_gives_the_bases_files(adapter: Path, small_base: Path, tmp_path: Path) -> None:
    zero = without_provenance(adapter, tmp_path / "zero", zero_b)
    out = tmp_path / "out"
    assert main(["export", str(zero), "--to", "mxfp4", "--out", str(out), "--no-verify", *NEAREST]) == 0
    for path in small_base.iterdir():
        if path.name not in ("README.md", "checksums.json"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_dry_run_lists_every_tensor_and_writes_nothing(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(adapter), "--to", "bf16", "--out", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"merge experts         196,608  {GATE_UP} BF16 8x64x192  rank 3" in printed
    assert "12 of them" not in printed and "changed by the adapter" in printed and "tokenizer.json" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_the_origin_and_shows_no_record(adapter: Path, small_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    composed = compose("quickstart", ["export.survival_examples=0"])
    (run / "config.yaml").write_text(dump_yaml(composed.config))
    figures = {"rows": 48, "loss": 2.0, "loss_interval": [1.5, 2.5], "confidence": 0.95}
    evaluation = {"before": figures | {"loss": 9.0, "loss_interval": [8.0, 10.0]}, "after": figures}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert main(["export", str(run), "--to", "mxfp4", "--no-verify", *NEAREST]) == 0
    record = json.loads((run / "export" / "mxfp4" / "export.json").read_text())
    card = (run / "export" / "mxfp4" / "README.md").read_text()
    assert record["base"]["identity"] in card and "CC BY 4.0" in card
    assert "5a298e9e5bf933728b54577b5a8e43e6c05bf1c8230343022cad75d4542c716a" in card  # data/LICENSES.md lists it
    assert "9.000 [8.000, 10.000] | 2.000 [1.500, 2.500]" in card
    assert "no legal advice" in card and "no medical advice" not in card
    assert f"{record['survival']['overall']['survival']:.1%} of the fine-tune's update" in card
    clause = load_split(composed.config.data, "validation").records[0].messages[-2].content
    assert clause[:60] not in card and str(small_base.parent) not in card


# --- what is copied of the base


def test_only_a_models_files_are_copied_and_the_others_are_named(
    small_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    (base / ".env").write_text("HF_TOKEN=hf_secret")
    (base / "token").symlink_to(base / ".env")
    (base / "notes.txt").write_text("private")
    (base / "chat_template.jinja").unlink()
    (base / "LICENSE.txt").write_text("terms")
    command = ["export", str(adapter), "--to", "mxfp4", *NEAREST, "--no-verify", "--base", str(base)]
    assert main([*command, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"not copied: {name}" in printed for name in (".env", "notes.txt", "token"))
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "not copied, since no model needs them: .env, notes.txt, token" in said
    assert "the base has no chat_template.jinja" in said
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == chat_template()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "config.json", "LICENSE.txt"} <= names and not names & {".env", "token", "notes.txt"}


def test_links_out_of_the_base_are_refused_and_those_of_the_hub_cache_followed(
    small_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "models--x--y"
    blobs = cache / "blobs"
    base = cache / "snapshots" / ("0" * 40)
    shutil.copytree(small_base, base)
    blobs.mkdir()
    (base / "tokenizer.json").rename(blobs / "abc")
    (base / "tokenizer.json").symlink_to(Path("../../blobs/abc"))
    copied = [path.name for path in companions(Checkpoint.open(base))]
    assert "tokenizer.json" in copied
    secret = tmp_path / "token"
    secret.write_text("hf_secret")
    (base / "README.md").unlink(missing_ok=True)
    (base / "README.md").symlink_to(secret)
    command = ["export", str(adapter), "--to", "mxfp4", *NEAREST, "--no-verify", "--base", str(base)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert f"README.md is a link to {secret}" in said and not (tmp_path / "out").exists()
