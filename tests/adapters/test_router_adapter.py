"""Trained routers: stock PEFT reads them, files round-trip, merges include the biases, which adapter files lack."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from router_runs import SMALL, new_base, shake
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from finetune.adapters.attach import attach_adapter
from finetune.adapters.audit import audit_gradients
from finetune.adapters.config_file import CONFIG
from finetune.adapters.layout import EXPERTS, lora_config_fields, site_strengths
from finetune.adapters.lora import Adapter
from finetune.adapters.provenance import ROUTER_BIAS, BaseRecord
from finetune.adapters.read_back import read_back
from finetune.adapters.sites import describe_sites, plan_sites
from finetune.adapters.store import WEIGHTS, read_adapter_into, write_adapter
from finetune.cli.main import main
from finetune.config.schema import AdapterConfig, RouterAdapterConfig
from finetune.data.harmony.render import Example
from finetune.errors import CheckError, InputError
from finetune.evaluate.opening import open_model
from finetune.model.build import Base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import logits
from finetune.model.noise import rounding_noise

LORA = replace(SMALL, router=RouterAdapterConfig(mode="lora", rank=2, alpha=6.0))
FULL = replace(SMALL, router=RouterAdapterConfig(mode="full"), rslora=True)
CONFIGS = {
    "lora": LORA,
    "full": FULL,
    "layer 1": replace(LORA, layers=(1, 1)),
    "full, rslora off": replace(FULL, rslora=False),
}
OFTEN = ("lora", "full")


def sample(count: int = 80) -> Example:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(199_998, (count,), generator=g).int().numpy()
    return Example(ids, torch.ones(count).numpy(), "random", "nowhere:1")


def trained(directory: Path, config: AdapterConfig) -> tuple[Base, Adapter]:
    base = new_base(directory)
    adapter = attach_adapter(base, config, seed=0)
    shake(adapter.parameters(), 0.3)
    return base, adapter


def write(out: Path, base: Base, adapter: Adapter, config: AdapterConfig) -> Path:
    name = str(base.checkpoint.directory)
    write_adapter(out, adapter, config, BaseRecord(name, None, base.identity))
    return out


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_stock_peft_reads_the_router_back(name: str, tiny_base: Path, tmp_path: Path) -> None:
    base, adapter = trained(tiny_base, CONFIGS[name])
    directory = write(tmp_path / "adapter", base, adapter, CONFIGS[name])
    result = read_back(base, adapter, directory, [sample()])
    assert result.max_difference <= result.limit
    assert result.limit < 1e-2 < result.effect
    if name != "lora":
        return
    tensors = load_file(directory / WEIGHTS)  # control: a reader that ignored the router would have been noticed
    for key in tensors:
        if "mlp.router.lora_B" in key:
            tensors[key].zero_()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckError, match="is not the model that was trained"):
        read_back(base, adapter, directory, [sample()])


def test_peft_supports_a_router_only_as_a_parameter() -> None:
    """transformers 5's router is no nn.Linear: as a target module it is refused, as a parameter it is found."""

    def dense() -> GptOssForCausalLM:
        sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "vocab_size": 32, "head_dim": 16}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return GptOssForCausalLM(GptOssConfig(**sizes, **heads))

    with pytest.raises(ValueError, match="GptOssTopKRouter"):
        get_peft_model(dense(), LoraConfig(r=2, target_modules=["q_proj", "router"]))
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.router.weight"])
    model = get_peft_model(dense(), config)
    names = {name for name, p in model.named_parameters() if p.requires_grad and "router" in name}
    path = "base_model.model.model.layers.{}.mlp.router.lora_{}.default.weight"
    assert names == {path.format(number, factor) for number in (0, 1) for factor in "AB"}


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_training_continues_from_a_saved_router(config: AdapterConfig, tiny_base: Path, tmp_path: Path) -> None:
    base, adapter = trained(tiny_base, config)
    directory = write(tmp_path / "adapter", base, adapter, config)
    opened = open_model(directory)  # an adapter alone, without its run
    assert [site.whole for site in opened.adapter.sites] == [site.whole for site in adapter.sites]
    for name, parameter in adapter.parameters().items():
        torch.testing.assert_close(opened.adapter.parameters()[name], parameter, rtol=1e-6, atol=1e-7)
    fresh = new_base(tiny_base)
    again = attach_adapter(fresh, config, seed=5)
    read_adapter_into(directory, again, config, base.identity)
    for name, parameter in adapter.parameters().items():
        torch.testing.assert_close(again.parameters()[name], parameter, rtol=1e-6, atol=1e-7)
    ids = torch.from_numpy(sample().ids).long()
    with torch.no_grad():
        limit = rounding_noise(base.model, lambda: logits(base.model, ids))
        assert (logits(fresh.model, ids) - logits(base.model, ids)).abs().max() <= limit
        assert limit < 1e-2
    if config is FULL:
        (directory / ROUTER_BIAS).unlink()
        with pytest.raises(InputError, match=f"lacks {ROUTER_BIAS}"):
            read_adapter_into(directory, again, config, base.identity)


def test_a_fresh_router_changes_nothing_and_is_audited(tiny_base: Path) -> None:
    ids = torch.from_numpy(sample().ids).long()
    for config in (LORA, FULL):
        base = new_base(tiny_base)
        with torch.no_grad():
            plain = logits(base.model, ids)
            adapter = attach_adapter(base, config, seed=0)
            torch.testing.assert_close(logits(base.model, ids), plain, rtol=0, atol=0)
        logits(base.model, ids).logsumexp(-1).sum().backward()
        assert audit_gradients(base.model, adapter, "b").sites == 12
        with pytest.raises(CheckError, match="no gradient reaches"):
            audit_gradients(base.model, adapter, "a")
        assert "2 routers" in describe_sites(list(adapter.sites), base.checkpoint.arch)
        router = base.model.model.layers[0].mlp.router
        (router.bias_change if config is FULL else router.lora_b).grad = None
        with pytest.raises(CheckError, match=r"layers\.0\.mlp\.router"):
            audit_gradients(base.model, adapter, "b")


def test_the_files_have_the_fields_of_peft_and_vllm(tiny_base: Path, tmp_path: Path) -> None:
    base, adapter = trained(tiny_base, FULL)
    directory = write(tmp_path / "adapter", base, adapter, FULL)
    config, shape = json.loads((directory / CONFIG).read_text()), base.checkpoint.arch
    assert config["target_parameters"][0] == "mlp.router.weight" and "router" not in config["target_modules"]
    assert config["rank_pattern"] == {r"mlp.router(\.weight)?": shape.num_experts}
    tensors = load_file(directory / WEIGHTS)
    key = "base_model.model.model.layers.0.mlp.router.lora_A.weight"
    assert tensors[key].shape == (shape.num_experts, shape.hidden)
    assert set(json.loads((directory / ROUTER_BIAS).read_text())) == {
        f"model.layers.{n}.mlp.router.bias" for n in (0, 1)
    }
    assert ROUTER_BIAS in json.loads((directory / "finetune.json").read_text())["files"]


def scale_in_vllm(config: dict[str, Any], module: str) -> float:
    """The rule of vLLM 0.33's `PEFTHelper.get_rank_and_scaling`: patterns are matched with names of modules."""

    def setting(patterns: str, default: str) -> float:
        found = [v for key, v in config.get(patterns, {}).items() if re.match(rf"(.*\.)?({key})$", module)]
        return found[0] if found else config[default]

    rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


@pytest.mark.parametrize("name", CONFIGS)
def test_vllm_scales_every_site_as_trained(name: str, tiny_base: Path) -> None:
    """By PEFT's own name of the router's weight vLLM finds no pattern, and falls back to lora_alpha / r."""
    arch, adapter_config = Checkpoint.open(tiny_base).arch, CONFIGS[name]
    sites = plan_sites(arch, adapter_config)
    fields = lora_config_fields(
        site_strengths(sites), every_layer=adapter_config.layers is None, rslora=adapter_config.rslora
    )
    old = {
        key: {name.replace(r"(\.weight)?", ".weight"): value for name, value in fields.get(key, {}).items()}
        for key in ("rank_pattern", "alpha_pattern")
    }
    for site in sites:
        names = [site.module] if site.kind != "experts" else [f"{site.module}.{name}" for name in EXPERTS]
        for module in names:
            assert scale_in_vllm(fields, module) == pytest.approx(site.scale), module
        if site.kind == "router" and any("router" in key for pattern in old.values() for key in pattern):
            assert scale_in_vllm({**fields, **old}, site.module) != pytest.approx(site.scale), "control: PEFT's name"


def test_a_merge_includes_the_bias_and_adapter_exports_cannot(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = trained(tiny_base, FULL)
    directory = write(tmp_path / "adapter", base, adapter, FULL)
    for target in ("bf16", "mxfp4"):
        options = ["--rounding", "nearest"] if target == "mxfp4" else []
        assert main(["export", str(directory), "--to", target, "--out", str(tmp_path / target), *options]) == 0
        merged = {name: t for file in (tmp_path / target).glob("*.safetensors") for name, t in load_file(file).items()}
        for number in (0, 1):
            name = f"model.layers.{number}.mlp.router.bias"
            router = base.model.model.layers[number].mlp.router
            wanted = (router.bias + router.bias_change).bfloat16()
            assert torch.equal(merged[name], wanted) and not torch.equal(wanted, router.bias.bfloat16())
    capsys.readouterr()
    assert main(["export", str(directory), "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert "biases" in capsys.readouterr().err
    assert main(["export", str(directory), "--to", "sglang", "--out", str(tmp_path / "sglang")]) == 3
    assert "merge it instead" in capsys.readouterr().err


def test_combining_adapters_adds_their_biases(tiny_base: Path, tmp_path: Path) -> None:
    base, adapter = trained(tiny_base, FULL)
    directory = write(tmp_path / "adapter", base, adapter, FULL)
    assert main(["adapter", "combine", f"{directory}:0.5", f"{directory}:0.25", "--out", str(tmp_path / "sum")]) == 0
    one, both = (json.loads((d / ROUTER_BIAS).read_text()) for d in (directory, tmp_path / "sum"))
    name = "model.layers.1.mlp.router.bias"
    assert both[name] == pytest.approx([0.75 * value for value in one[name]], rel=1e-6)
