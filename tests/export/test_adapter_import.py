"""Adapters of other trainers: settings that change what tensors mean, other names and layouts, what was left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from serving_layouts import Updates, assert_same_updates, read_peft
from synthetic_adapter import EXPERTS, Synthetic, write_synthetic

from finetune.adapters.config_file import read_adapter_config
from finetune.adapters.store import AdapterFile
from finetune.cli.main import main
from finetune.errors import InputError
from finetune.export.importing import import_adapter
from finetune.export.options import ExportOptions

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SITES = {(0, "q_proj"): (2, 4.0), (1, "gate_up_proj"): (2, 3.0), (1, "down_proj"): (2, 5.0)}
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapter(tmp_path: Path) -> Synthetic:
    return write_synthetic(tmp_path / "theirs", SITES)


def configured(directory: Path, **settings: Any) -> Path:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | settings))
    return directory


def with_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    tensors = change(load_file(directory / WEIGHTS))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / WEIGHTS)
    return directory


def imported(directory: Path, out: Path) -> Updates:
    import_adapter(directory, out, ExportOptions())
    return read_peft(out)


# Settings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("init_lora_weights", kind) for kind in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq")],
        ("init_lora_weights", "lora_ga"),
        ("alora_invocation_tokens", [200006, 173781]),
        ("use_dora", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [5]),
        ("trainable_token_indices", {"embed_tokens": [5]}),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"rank": 2}),
        ("monteclora_config", {"n": 4}),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("lora_B_layout", "rank_first"),
        ("a_setting_of_a_later_release", "on"),
    ],
)  # fmt: skip
def test_a_setting_that_changes_what_tensors_mean_is_refused_by_name(
    key: str, value: Any, adapter: Synthetic, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = configured(adapter.directory, **{key: value})
    for words in (["adapter", "import", directory], ["export", directory, "--to", "peft"]):
        assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 3
        errors = capfd.readouterr().err
        assert f"{key} is {value!r}" in errors and "fix:" in errors
    assert not (tmp_path / "out").exists()


def test_every_default_of_peft_is_accepted(adapter: Synthetic, tmp_path: Path) -> None:
    """A setting of a newer PEFT with a default that this reader refuses shows up here, in the next pinned version."""
    defaults = LoraConfig(task_type="CAUSAL_LM", inference_mode=True).to_dict()
    stored = json.loads((adapter.directory / CONFIG).read_text())
    plain = json.loads(json.dumps(defaults | stored, default=str))
    (adapter.directory / CONFIG).write_text(json.dumps(plain))
    assert_same_updates(imported(adapter.directory, tmp_path / "out"), adapter)
    assert {field.name for field in dataclasses.fields(LoraConfig)} >= {"init_lora_weights", "layer_replication"}


@pytest.mark.parametrize("kind", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_accepted(kind: Any, adapter: Synthetic, tmp_path: Path) -> None:
    directory = configured(adapter.directory, init_lora_weights=kind, lora_dropout=0.1, eva_config={"rho": 1.0})
    assert_same_updates(imported(directory, tmp_path / "out"), adapter)
    record = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert record["ignored_settings"]["lora_dropout"] == 0.1 and "eva_config" in record["ignored_settings"]
    assert ("init_lora_weights" in record["ignored_settings"]) == isinstance(kind, str)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_to_transform": 1}, "layers_to_transform"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"target_modules": ["k_proj", "v_proj"]}, "target_modules"),
        ({"exclude_modules": r"model\.layers\.0\..*q_proj"}, "exclude_modules"),
    ],
)
def test_tensors_that_peft_would_ignore_are_refused(settings: dict[str, Any], name: str, adapter: Synthetic) -> None:
    with pytest.raises(InputError, match=f"q_proj.*{name}"):
        AdapterFile.open(configured(adapter.directory, **settings))
    harmless: dict[str, Any] = {
        "layers_to_transform": [0, 1],
        "exclude_modules": ["v_proj"],
        "target_modules": ["q_proj"],
    }
    AdapterFile.open(configured(adapter.directory, **harmless))


# The order of lora_B


def grouped(tensors: Tensors) -> Tensors:
    """Unsloth's order of experts' B: [out, E·r] with the rank fastest."""
    return {
        key: t.view(len(t), -1, EXPERTS).transpose(1, 2).reshape(len(t), -1) if "experts" in key and "_B" in key else t
        for key, t in tensors.items()
    }


def test_unsloths_marker_is_read(adapter: Synthetic, tmp_path: Path) -> None:
    directory = configured(with_tensors(adapter.directory, grouped), lora_B_layout="grouped_by_expert")
    with pytest.raises(InputError, match="adapter import"):
        AdapterFile.open(directory)
    assert_same_updates(imported(directory, tmp_path / "out"), adapter)
    assert json.loads((tmp_path / "out" / CONFIG).read_text()).get("lora_B_layout") is None
    unmarked = imported(configured(directory, lora_B_layout=None), tmp_path / "unmarked")
    difference = (unmarked[1, "down_proj"] - adapter.updates[1, "down_proj"]).abs().max()
    assert difference > 0.1 * adapter.updates[1, "down_proj"].abs().max(), "control: the order matters"


def unsloth_details(*orders: str, lora_a: str = "grouped_by_expert") -> dict[str, Any]:
    """The setting that Unsloth writes beside lora_B_layout: the order of each projection."""
    projections = zip(("gate_up_proj", "down_proj"), orders, strict=False)
    parameters = {name: {"lora_B_layout": order, "num_experts": EXPERTS} for name, order in projections}
    return {"lora_A_layout": lora_a, "parameters": parameters}


@pytest.mark.parametrize("top", [True, False], ids=["both settings", "details alone"])
@pytest.mark.parametrize("order", ["grouped_by_expert", "rank_major"])
def test_what_unsloth_writes_today_is_read(
    order: str, top: bool, adapter: Synthetic, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Releases after the change of its order write rank_major, PEFT's own, and details for each projection."""
    settings = {"unsloth_fused_expert_lora": unsloth_details(order, order)} | ({"lora_B_layout": order} if top else {})
    directory = configured(adapter.directory, **settings)
    if order == "grouped_by_expert":
        with_tensors(directory, grouped)
    assert_same_updates(imported(directory, tmp_path / "out"), adapter)
    assert "no lora_B_layout" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"unsloth_fused_expert_lora": unsloth_details("grouped_by_expert", "rank_major")},
        {"unsloth_fused_expert_lora": unsloth_details("rank_major"), "lora_B_layout": "grouped_by_expert"},
        {"unsloth_fused_expert_lora": unsloth_details("expert_major")},
        {"unsloth_fused_expert_lora": unsloth_details("rank_major", lora_a="rank_major")},
        {"lora_B_layout": "mixed"},
    ],
    ids=["projections differ", "settings differ", "unknown", "lora_A", "mixed"],
)
def test_orders_that_differ_or_are_not_known_are_refused(settings: dict[str, Any], adapter: Synthetic) -> None:
    with pytest.raises(InputError, match=r"lora_[AB]_layout is"):
        read_adapter_config(configured(adapter.directory, **settings))


def test_an_unsloth_file_without_the_marker_is_pointed_out(
    adapter: Synthetic, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configured(adapter.directory, base_model_name_or_path="unsloth/gpt-oss-20b")
    assert_same_updates(imported(adapter.directory, tmp_path / "out"), adapter)
    assert "no lora_B_layout to tell them apart" in capfd.readouterr().err


# Names and layouts


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".legal-v2.weight"),
        lambda key: key.replace("model.layers", "_orig_mod.model.layers"),
        lambda key: "module." + key,
        lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        lambda key: "module._fsdp_wrapped_module." + key.replace(".weight", ".default.weight"),
    ],
    ids=["default", "another name", "compiled", "data parallel", "checkpointed", "several"],
)  # fmt: skip
def test_words_of_wrappers_in_names_are_removed(
    rename: Callable[[str], str], adapter: Synthetic, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = with_tensors(adapter.directory, lambda tensors: {rename(k): t for k, t in tensors.items()})
    assert_same_updates(imported(directory, tmp_path / "out"), adapter)
    assert "removed from names" in capfd.readouterr().err
    with pytest.raises(InputError, match="finetune adapter import"):
        AdapterFile.open(directory)


def test_two_adapters_in_one_file_are_refused(adapter: Synthetic, tmp_path: Path) -> None:
    def doubled(tensors: Tensors) -> Tensors:
        return {key.replace(".weight", f".{name}.weight"): t.clone() for name in "ab" for key, t in tensors.items()}

    with pytest.raises(InputError, match="both mean"):
        imported(with_tensors(adapter.directory, doubled), tmp_path / "out")


def expert_factors(tensors: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [E, r, in] and B [E, out, r] of the synthetic adapter's two projections."""
    found = {}
    for name, middle in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        path = f"base_model.model.model.layers.1.mlp.experts{middle}.lora_"
        a, b = tensors.pop(f"{path}A.weight"), tensors.pop(f"{path}B.weight")
        a, b = a.view(EXPERTS, -1, a.shape[1]), b.view(len(b), -1, EXPERTS).permute(2, 0, 1)
        found[name] = a, b
    return found


def numbered_last(tensors: Tensors) -> Tensors:
    path = "base_model.model.model.layers.1.mlp.experts"
    for name, (a, b) in expert_factors(tensors).items():
        for expert in range(EXPERTS):
            tensors[f"{path}.{name}s.{expert}.lora_A.weight"] = a[expert]
            tensors[f"{path}.{name}s.{expert}.lora_B.weight"] = b[expert]
    return tensors


def stacked(names: tuple[str, str, str]) -> Callable[[Tensors], Tensors]:
    """Gate, up and down stacked over experts, under other names."""

    def change(tensors: Tensors) -> Tensors:
        path, found = "base_model.model.model.layers.1.mlp.experts", expert_factors(tensors)
        (a, b), (down_a, down_b) = found["gate_up_proj"], found["down_proj"]
        parts = ((a, b[:, 0::2]), (a, b[:, 1::2]), (down_a, down_b))
        for name, (first, second) in zip(names, parts, strict=True):
            tensors[f"{path}.{name}.lora_A.weight"] = first.clone()
            tensors[f"{path}.{name}.lora_B.weight"] = second.clone()
        return tensors

    return change


def same_strength(directory: Path) -> Path:
    """One rank and alpha for all, as those trainers write it."""
    return configured(directory, r=2, lora_alpha=4.0, rank_pattern={}, alpha_pattern={}, target_parameters=[],
                      target_modules="all-linear")  # fmt: skip


def test_a_raw_adapter_of_tinker_is_imported(tmp_path: Path) -> None:
    """Its attention is `attn`, gate, up and down are w1, w3 and w2, and the settings are r and lora_alpha alone."""
    adapter = write_synthetic(tmp_path / "theirs", {site: (2, 4.0) for site in SITES})

    def raw(tensors: Tensors) -> Tensors:
        return {k.replace("self_attn", "attn"): t for k, t in stacked(("w1", "w3", "w2"))(tensors).items()}

    directory = with_tensors(adapter.directory, raw)
    (directory / CONFIG).write_text('{"r": 2, "lora_alpha": 4}')
    assert_same_updates(imported(directory, tmp_path / "out"), adapter)
    key = "base_model.model.model.unembed_tokens.lora_A.weight"
    with_tensors(directory, lambda tensors: tensors | {key: torch.ones(2, 2)})
    with pytest.raises(InputError, match=r"unembed_tokens.*output head"):
        imported(directory, tmp_path / "head")


@pytest.mark.parametrize(
    "change",
    [numbered_last, stacked(("gate_proj", "up_proj", "down_proj")), stacked(("w1", "w3", "w2"))],
    ids=["unsloth", "stacked", "tinker"],
)
def test_experts_in_other_layouts_are_the_same_updates(change: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    adapter = write_synthetic(tmp_path / "theirs", {site: (2, 4.0) for site in SITES})
    directory = same_strength(with_tensors(adapter.directory, change))
    assert_same_updates(imported(directory, tmp_path / "out"), adapter)


def test_factors_that_experts_share_are_repeated(tmp_path: Path) -> None:
    adapter = write_synthetic(tmp_path / "theirs", {(1, "gate_up_proj"): (2, 4.0), (1, "down_proj"): (2, 4.0)})

    def shared(tensors: Tensors) -> Tensors:
        tensors = stacked(("w1", "w3", "w2"))(tensors)
        return {key: t[:1].clone() if "w2.lora_A" in key else t for key, t in tensors.items()}

    found = imported(same_strength(with_tensors(adapter.directory, shared)), tmp_path / "out")
    tensors = load_file(adapter.directory / WEIGHTS)
    a, b = (tensors[f"base_model.model.model.layers.1.mlp.experts.w2.lora_{f}.weight"].double() for f in "AB")
    assert (found[1, "down_proj"] - 2 * b @ a[0]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices"),
        ("base_model.model.lm_head.lora_A.weight", "output head"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", "DoRA"),
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx-lm"),
        ("blk.0.attn_q.weight.lora_a", "llama.cpp|mlx-lm"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "Megatron"),
        ("base_model.model.model.layers.0.input_layernorm.weight", "norms"),
        ("base_model.model.model.layers.0.mlp.router.weight", "modules_to_save"),
        ("model.layers.0.self_attn.q_proj.weight", "whole weights"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "whole weights"),
        ("something.else", "no LoRA factor of gpt-oss"),
    ],
)
def test_other_layouts_are_refused_by_name_and_not_sent_in_a_circle(
    key: str, words: str, adapter: Synthetic, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = with_tensors(adapter.directory, lambda tensors: tensors | {key: torch.ones(2, 2)})
    assert main(["adapter", "import", str(directory), "--out", str(tmp_path / "out")]) == 3
    errors = capfd.readouterr().err
    assert any(word in errors for word in words.split("|")) and "adapter import" not in errors.split("error:")[-1]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapters.safetensors", "an adapter of mlx-lm"),
        ("adapter.gguf", "an adapter of llama.cpp"),
        ("adapter_model-00001-of-00002.safetensors", "split into several files"),
        ("adapter_model.bin", "can run code"),
        ("adapter_model.pth", "can run code"),
        ("__0_0.distcp", "a distributed checkpoint"),
        ("model-00001-of-00003.safetensors", "a whole model"),
        ("default/adapter_model.safetensors", "a folder of adapters"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_directories_of_another_kind_are_refused_by_what_they_are(
    file: str, words: str, has_config: bool, adapter: Synthetic, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Our own exports to mlx-lm and llama.cpp too."""
    directory = tmp_path / "other"
    (directory / file).parent.mkdir(parents=True)
    (adapter.directory / WEIGHTS).rename(directory / file)
    if has_config:
        (directory / CONFIG).write_text('{"fine_tune_type": "lora"}')
    out = ["--out", str(tmp_path / "out")]
    for command in (["adapter", "import", *out], ["export", "--to", "peft", *out], ["adapter", "show"]):
        assert main([*command, str(directory)]) == 3
        errors = capfd.readouterr().err
        assert words in errors and "fix:" in errors and "adapter import" not in errors


def test_a_missing_expert_is_refused_unless_only_some_are_named(tmp_path: Path) -> None:
    adapter = write_synthetic(tmp_path / "theirs", {site: (2, 4.0) for site in SITES})

    def cut(tensors: Tensors) -> Tensors:
        return {key: t for key, t in numbered_last(tensors).items() if "down_projs.1." not in key}

    directory = same_strength(with_tensors(adapter.directory, cut))
    with pytest.raises(InputError, match=r"lacks the factors of .*experts\.1\.down_proj"):
        imported(directory, tmp_path / "out")
    named = ["q_proj", *(f"gate_up_projs.{e}" for e in range(EXPERTS)), "down_projs.0", "down_projs.2"]
    found = imported(configured(directory, target_modules=named), tmp_path / "some")
    assert found[1, "down_proj"][1].count_nonzero() == 0 and found[1, "down_proj"][0].any()


def test_what_was_left_out_is_recorded(adapter: Synthetic, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "optimizer.pt", "README.md"):
        (adapter.directory / name).write_text("{}")
    imported(adapter.directory, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert record["left_out_files"] == ["README.md", "optimizer.pt", "tokenizer.json"]
    assert read_adapter_config(tmp_path / "out").ignored() == {}
