"""Merged exports: arithmetic, files, what happens when something goes wrong, and others' code reading the results."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from finetune.adapters.files import PROVENANCE, WEIGHTS, write_adapter
from finetune.adapters.lora import attach_adapter
from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.locate import shipped_dir
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig
from finetune.config.validate import dump_yaml
from finetune.data.dataset import load_split
from finetune.data.render import Sample
from finetune.errors import CheckError, InputError
from finetune.export import execute, staging
from finetune.export.card import write_card
from finetune.export.merge import Tally, round_experts
from finetune.export.merged import export_merged
from finetune.export.plan import plan_merge
from finetune.export.source import AdapterSource, Factors, open_adapter
from finetune.export.staging import Staging
from finetune.export.targets import ExportOptions
from finetune.export.verify import compare_logits, compare_weights
from finetune.model.build import load_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.shapes import ModelShape
from finetune.mxfp4.format import dequantise

ADAPTER = AdapterConfig(
    attention=AttentionAdapterConfig(rank=6, alpha=12.0), experts=ExpertAdapterConfig(rank=3, alpha=5.0)
)
VOCABULARY = 512
IDS = torch.randint(500, (40,), generator=torch.Generator().manual_seed(3)).tolist()
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def small_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with the first 512 tokens only: GGUF packs and reads every token and merge in Python."""
    directory = tmp_path_factory.mktemp("bases") / "small"
    shutil.copytree(tiny_base, directory)
    (directory / "checksums.json").unlink()
    for number, name in ((1, "model.embed_tokens.weight"), (3, "lm_head.weight")):
        shard = directory / f"model-0000{number}-of-00003.safetensors"
        tensors = load_file(shard)
        tensors[name] = tensors[name][:VOCABULARY].clone()
        save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"vocab_size": VOCABULARY, "eos_token_id": 500, "pad_token_id": 501}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < 500}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    tokenizer["added_tokens"] = [
        entry | {"id": 500 + place} for place, entry in enumerate(tokenizer["added_tokens"]) if place < 3
    ]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture(scope="module")
def adapter(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes weights by some per cent."""
    base = load_base(Checkpoint.open(small_base), torch.device("cpu"), torch.float32, experts_per_chunk=8)
    live = attach_adapter(base, ADAPTER, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in live.parameters().items():
            if name.endswith("b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    directory = tmp_path_factory.mktemp("merge") / "adapter"
    names = {"base_name": str(small_base), "base_revision": None, "base_identity": base.identity}
    write_adapter(directory, live, ADAPTER, **names)
    return directory


@pytest.fixture(scope="module")
def exported(adapter: Path) -> Callable[[str], Path]:
    """Directories of the targets, each exported once, through the command line, verification included."""

    def export(target: str, *extra: str) -> Path:
        out = adapter.with_name("-".join([target, *extra]))
        if not out.exists():
            assert main(["export", str(adapter), "--to", target, "--out", str(out), *extra]) == 0
        return out

    return export


def without_provenance(adapter: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy with other tensors and no record of what was written."""
    shutil.copytree(adapter, to)
    (to / PROVENANCE).unlink()
    tensors = load_file(to / WEIGHTS)
    change(tensors)
    save_file(tensors, to / WEIGHTS)
    return to


def zero_b(tensors: dict[str, torch.Tensor]) -> None:
    for key in tensors:
        if "lora_B" in key:
            tensors[key] = torch.zeros_like(tensors[key])


# --- arithmetic


def random_packed(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)  # -0 among the codes
    return blocks, torch.randint(115, 130, shape, generator=generator, dtype=torch.uint8)


def test_rounding_an_update_of_zero_changes_no_byte() -> None:
    blocks, scales = random_packed(0, 2, 40, 3)
    none = Factors(torch.randn(2, 4, 96), torch.zeros(2, 40, 4), 1.0)
    new_blocks, new_scales, tally = round_experts(blocks, scales, none)
    assert torch.equal(new_blocks, blocks) and torch.equal(new_scales, scales)
    assert tally.changed == 0 and tally.survival == 1.0


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.1, 3.0])
def test_rounding_is_nearest_and_never_further_than_the_base(size: float) -> None:
    """Oracle: float64 and every code of the block's scale, tried one by one."""
    blocks, scales = random_packed(1, 2, 48, 4)
    a, b = torch.randn(2, 3, 128), torch.randn(2, 48, 3) * size
    new_blocks, new_scales, tally = round_experts(blocks, scales, Factors(a, b, 0.7))
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
    checkpoint = Checkpoint(Path("nowhere"), config, ModelShape.from_config(config, "config.json"), {})
    source = AdapterSource(adapter, {}, None, None, None, ())
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
    """What our own training never makes: rsLoRA with patterns, single projections, some layers, the router."""
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
def test_bf16_is_what_peft_merges(
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
    assert difference.abs().max() < 1e-4


def test_merged_directories_carry_the_bases_files(exported: Callable[..., Path], small_base: Path) -> None:
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
    assert Checkpoint.open(exported("mxfp4")).verify_checksums()


def test_an_mxfp4_merge_leaves_other_bytes_alone(exported: Callable[..., Path], small_base: Path) -> None:
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
    assert main(["export", str(zero), "--to", "mxfp4", "--out", str(out), "--no-verify"]) == 0
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


def transformers_log_probabilities(directory: Path) -> np.ndarray:
    packed = "quantization_config" in json.loads((directory / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        **({"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}),
    ).float()
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].double().log_softmax(-1).numpy()


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="needs mlx[cpu] and mlx-lm (extra `dev`)")
def test_mlx_lm_reads_the_native_directory(exported: Callable[..., Path], tmp_path: Path) -> None:
    out = exported("mxfp4")
    theirs = foreign("mlx", out, tmp_path / "mlx.npy")
    assert np.abs(theirs - transformers_log_probabilities(truncating(out, tmp_path / "truncating"))).max() < 5e-5


@pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None, reason="needs gguf and xllamacpp (extra `dev`)"
)
@pytest.mark.parametrize("experts", ["bf16", "mxfp4"])
def test_llama_cpp_reads_the_gguf_file(experts: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp rounds activations to bfloat16 or 8 bits where weights are, so it is given the file widened as well."""
    out = exported("gguf", "--gguf-experts", experts)
    file = out / f"model-{experts}.gguf"
    expected = transformers_log_probabilities(truncating(exported(experts), tmp_path / "truncating"))[-1]
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
    plan = plan_merge(Checkpoint.open(small_base), open_adapter(adapter), "bf16")
    updates = json.loads((exported("bf16") / "export.json").read_text())["updates"]
    tallies = {name: Tally(wanted=norm**2) for name, norm in updates.items()}
    problems = compare_weights(plan, "bf16", bad, tallies)["problems"]
    assert problems == {
        "model.extra": "unexpected",
        "model.layers.1.self_attn.sinks": "missing",
        "lm_head.weight": "values that are not finite",
        "model.norm.weight": "differs from the base, though the adapter leaves it alone",
        "model.layers.0.self_attn.q_proj": "1 places are not base + update, correctly rounded",
        GATE_UP: problems[GATE_UP],
    }
    assert "places are not base + update" in problems[GATE_UP]


@pytest.mark.slow
def test_logits_are_compared_and_a_lost_rope_setting_is_found(
    exported: Callable[..., Path], adapter: Path, small_base: Path, tmp_path: Path
) -> None:
    """Every weight may be right and the model wrong: transformers 5 alone knows `rope_parameters`, others lose YaRN."""
    samples = [Sample(np.array(IDS, dtype=np.int32), np.ones(len(IDS)), "random", "nowhere:1")]
    native = plan_merge(Checkpoint.open(small_base), open_adapter(adapter), "mxfp4")
    found = compare_logits(native, exported("mxfp4"), samples)
    assert found["merged"]["max_difference"] < 1e-4 < found["adapted"]["max_difference"]
    assert found["base"]["mean_kl"] > found["adapted"]["mean_kl"] > 0
    shutil.copytree(exported("bf16"), tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    del config["rope_scaling"], config["rope_theta"]
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default"}}))
    dense = plan_merge(Checkpoint.open(small_base), open_adapter(adapter), "bf16")
    right = compare_logits(dense, exported("bf16"), samples)
    assert right["adapted"]["mean_kl"] < 0.05 * right["base"]["mean_kl"]  # bfloat16 sends some tokens elsewhere
    with pytest.raises(CheckError, match="is not the model that was merged"):
        compare_logits(dense, tmp_path / "bad", samples)


def test_the_card_says_where_it_comes_from_and_shows_no_row(exported: Callable[..., Path], tmp_path: Path) -> None:
    composed = compose("quickstart", [])
    (tmp_path / "config.yaml").write_text(dump_yaml(composed.config))
    figures = {"rows": 48, "loss": 2.0, "loss_interval": [1.5, 2.5], "confidence": 0.95}
    evaluation = {"before": figures | {"loss": 9.0, "loss_interval": [8.0, 10.0]}, "after": figures}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    facts = json.loads((exported("mxfp4") / "export.json").read_text())
    write_card(tmp_path / "README.md", facts, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert facts["base"]["identity"] in card and "CC BY 4.0" in card
    assert "5a298e9e5bf933728b54577b5a8e43e6c05bf1c8230343022cad75d4542c716a" in card  # data/LICENSES.md lists it
    assert "9.000 [8.000, 10.000] | 2.000 [1.500, 2.500]" in card
    assert "no legal advice" in card and "no medical advice" in card
    assert f"{facts['survival']['overall']['survival']:.1%} of the fine-tune's update" in card
    clause = load_split(composed.config.data, "validation").records[0].messages[-2].content
    assert clause[:60] not in card and str(small_path(exported)) not in card


def small_path(exported: Callable[..., Path]) -> Path:
    """Where the base lies on this machine, which is nobody's business."""
    return Path(json.loads((exported("mxfp4") / "export.json").read_text())["base"]["name"]).parent


def test_a_failed_verification_exits_6_and_keeps_the_unfinished_name(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(blocks: torch.Tensor, scales: torch.Tensor, factors: Factors | None, **kind: bool) -> object:
        stronger = None if factors is None else Factors(factors.a, factors.b, factors.scale * 1.01)
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
    export_merged(open_adapter(adapter), target, out, ExportOptions(verify=False, **options), None)  # type: ignore[arg-type]


def test_an_existing_target_is_left_alone(adapter: Path, tmp_path: Path) -> None:
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


def test_too_small_a_disk_is_seen_before_writing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7)  # type: ignore[attr-defined]
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    assert main(["export", str(adapter), "--to", "bf16", "--out", str(tmp_path / "out")]) == 5
    assert "more bytes" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_finished_shards(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, written = execute._pieces, []

    def full(plan: object, operation: execute.Operation, *rest: object) -> object:
        if operation.name == "lm_head.weight":
            raise OSError(28, "No space left on device")
        written.append(operation.name)
        return pieces(plan, operation, *rest)  # type: ignore[arg-type]

    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    monkeypatch.setattr(execute, "_pieces", full)
    command = ["export", str(adapter), "--to", "mxfp4", "--out", str(out), "--no-verify"]
    assert main(command) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial"]
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]
    assert sorted(path.name for path in partial.iterdir()) == [*shards, "progress.json"]
    damaged = bytearray((partial / shards[1]).read_bytes())  # a finished shard that rots is made again
    damaged[-1] ^= 1
    (partial / shards[1]).write_bytes(damaged)
    monkeypatch.setattr(execute, "_pieces", lambda *rest: (written.append(rest[1].name), pieces(*rest))[1])
    written.clear()
    assert main(command) == 0
    assert "model.embed_tokens.weight" not in written and f"{GATE_UP}_blocks" in written
    assert Checkpoint.open(out).verify_checksums() and not partial.exists()


def test_a_kill_leaves_nothing_that_looks_whole_and_the_next_run_goes_on(
    exported: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    """SIGKILL in the second shard, then the same command: every weight file as in an undisturbed export."""
    code = (
        "import os, signal, sys; from finetune.export import execute; from finetune.cli.main import main\n"
        "pieces = execute._pieces\n"
        "def killed(plan, operation, *rest):\n"
        f"    if operation.name == '{GATE_UP}_scales': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return pieces(plan, operation, *rest)\n"
        "execute._pieces = killed; main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    command = ["export", str(adapter), "--to", "mxfp4", "--out", str(out), "--no-verify"]
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


def test_shards_of_another_export_are_not_kept(tmp_path: Path) -> None:
    first = Staging(tmp_path / "out", "key")
    first.half("a").write_bytes(b"1")
    first.finish_shard("a", {"sha256": staging.sha256(first.half("a"))})
    assert Staging(tmp_path / "out", "key").shards.keys() == {"a"}
    assert not Staging(tmp_path / "out", "another").shards and not (first.path / "a").exists()
