"""Settings of adapter_config.json against the code that reads them: PEFT's own starts, PEFT's and vLLM's patterns."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from synthetic_adapter import EXPERTS, write_synthetic
from test_export_adapters import export
from torch import nn

from finetune.adapters.config_file import CONFIG, read_adapter_config
from finetune.adapters.layout import ATTENTION, ROUTER, Strength, factor_keys, lora_config_fields, module_path
from finetune.adapters.layout import EXPERTS as EXPERT_NAMES
from finetune.adapters.provenance import ROUTER_BIAS
from finetune.adapters.store import WEIGHTS, AdapterFile
from finetune.cli.main import main
from finetune.errors import InputError
from finetune.export.base import is_known_dense
from finetune.export.combine import combine_adapters
from finetune.export.importing import import_adapter
from finetune.export.options import ADAPTER_TARGETS, ExportOptions
from finetune.export.targets.peft import vllm_commands

RANK, ALPHA = 4, 8
PROJECTION = "base_model.model.q_proj"


class Projection(nn.Module):
    """One linear layer, as PEFT's starts want it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 16] to [n, 12]."""
        return self.q_proj(x)


def trained_by_peft(plain: Projection, kind: Any, x: torch.Tensor, out: Path) -> torch.Tensor:
    """What a model computes that PEFT started in a way and that was then changed; its adapter is saved."""
    model = copy.deepcopy(plain)
    extra = {"eva": {"eva_config": EvaConfig()}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}.get(kind, {})
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], init_lora_weights=kind, **extra)
    if kind == "lora_ga":
        preprocess_loraga(model, config, lambda: model(x).pow(2).sum().backward())
    adapted = get_peft_model(model, config)
    if kind == "eva":
        directions = torch.linalg.qr(torch.randn(16, RANK))[0].T.contiguous()
        initialize_lora_eva_weights(adapted, eva_state_dict={PROJECTION: directions})
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        result = adapted(x)
    adapted.save_pretrained(out)
    return result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora", "lora_ga"],
)
def test_a_start_is_accepted_if_the_tensors_are_a_plain_lora_of_the_base(kind: Any, tmp_path: Path) -> None:
    """PEFT's own training is the oracle: base + scale · B A has to be what was trained."""
    torch.manual_seed(0)
    plain, x = Projection(), torch.randn(32, 16)
    wanted = trained_by_peft(plain, kind, x, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    a, b = (tensors[f"{PROJECTION}.lora_{factor}.weight"] for factor in "AB")
    with torch.no_grad():
        difference = (plain(x) + ALPHA / RANK * x @ a.T @ b.T - wanted).abs().max() / wanted.abs().max()
    assert json.loads((tmp_path / CONFIG).read_text())["init_lora_weights"] == kind
    try:
        read_adapter_config(tmp_path)
        accepted = True
    except InputError as error:
        accepted = False
        assert "init_lora_weights is" in error.what
    assert accepted == (difference < 1e-5), difference
    assert difference < 1e-5 or difference > 0.1, "a start is either right or far from it"


@pytest.mark.parametrize("target", ADAPTER_TARGETS)
def test_an_export_lists_what_it_does_not_take_over(target: str, tmp_path: Path) -> None:
    adapter = write_synthetic(tmp_path / "adapter", {(0, "o_proj"): (2, 4.0)}).directory
    assert not {"left_out", "ignored_settings"} & provenance(export(adapter, target, tmp_path / "plain")).keys()
    stored = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(stored | {"lora_dropout": 0.1, "init_lora_weights": "gaussian"}))
    (adapter / ROUTER_BIAS).write_text(json.dumps({"model.layers.0.mlp.router.bias": [0.5, 0.0, 0.25]}))
    found = provenance(export(adapter, target, tmp_path / "out"))
    assert found["ignored_settings"] == {"lora_dropout": 0.1, "init_lora_weights": "gaussian"}
    assert found["left_out"] == ["changes of 1 routers' biases"]


def test_a_combination_lists_what_it_does_not_take_over(tmp_path: Path) -> None:
    adapter = write_synthetic(tmp_path / "adapter", {(0, "o_proj"): (2, 4.0)}).directory
    stored = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(stored | {"lora_dropout": 0.1}))
    combine_adapters([(adapter, 1.0), (adapter, 0.5)], tmp_path / "out", None)
    found = provenance(tmp_path / "out")["merged_from"]
    assert [part["ignored_settings"] for part in found] == [{"lora_dropout": 0.1}] * 2


@pytest.mark.parametrize("target", ADAPTER_TARGETS)
def test_printed_commands_are_safe_to_copy(target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A base's name comes from files of others, and a directory may have spaces."""
    adapter = write_synthetic(tmp_path / "adapter", {(0, "o_proj"): (2, 4.0)}).directory
    stored = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(stored | {"base_model_name_or_path": "x; touch gone #"}))
    out = tmp_path / "my; out"
    assert main(["export", str(adapter), "--to", target, "--out", str(out)]) == 0
    commands = ("vllm serve", "python -m sglang", "mlx_lm.generate", "llama-cli")
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith(commands)]
    words = shlex.split(line)
    assert any(word.endswith(f"{out}" + "/adapter.gguf" * (target == "gguf-lora")) for word in words)
    assert ("x; touch gone #" in words) == (target != "gguf-lora")
    (adapter / CONFIG).write_text(json.dumps(stored | {"base_model_name_or_path": "x\x1b[2Jy"}))
    with pytest.raises(InputError, match="control characters"):
        read_adapter_config(adapter)


def test_weights_of_different_scales_need_a_vllm_that_reads_patterns(tmp_path: Path) -> None:
    alike = write_synthetic(tmp_path / "alike", {(0, "o_proj"): (2, 4.0), (0, "down_proj"): (4, 8.0)}).directory
    different = write_synthetic(tmp_path / "different", {(0, "o_proj"): (2, 4.0), (0, "down_proj"): (4, 4.0)}).directory
    assert len(vllm_commands(AdapterFile.open(alike), tmp_path)) == 1
    assert "older ones scale all alike" in vllm_commands(AdapterFile.open(different), tmp_path)[1]


def test_a_recorded_base_in_bfloat16_is_not_named_for_mlx(tiny_base: Path, tmp_path: Path) -> None:
    """Without --base too: mlx-lm refuses it."""
    base = tmp_path / "dense"
    base.mkdir()
    adapter = write_synthetic(tmp_path / "adapter", {(0, "o_proj"): (2, 4.0)}).directory
    stored = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(stored | {"base_model_name_or_path": str(base)}))
    config = json.loads((tiny_base / "config.json").read_text())
    for settings_, dense in ((config, False), ({k: v for k, v in config.items() if "quant" not in k}, True)):
        (base / "config.json").write_text(json.dumps(settings_))
        assert is_known_dense(AdapterFile.open(adapter)) == dense


@pytest.mark.parametrize("gone", ["1.gate_proj", "0.up_proj", f"{EXPERTS - 1}.down_proj", "1."])
def test_an_adapter_for_sglang_that_lacks_an_expert_is_refused(gone: str, tmp_path: Path) -> None:
    adapter = write_synthetic(tmp_path / "adapter", {(0, name): (2, 4.0) for name in EXPERT_NAMES}).directory
    out = export(adapter, "sglang", tmp_path / "sglang")
    (out / "finetune.json").unlink()
    import_adapter(out, tmp_path / "whole", ExportOptions())
    tensors = load_file(out / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if f"experts.{gone}" not in key}, out / WEIGHTS)
    with pytest.raises(InputError, match="lacks the factors of"):
        import_adapter(out, tmp_path / "cut", ExportOptions())


def provenance(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "finetune.json").read_text())
    return found


def by_vllm(fields: Mapping[str, Any], key: str) -> tuple[float, float]:
    """Rank and alpha of a tensor by the rule of vLLM 0.33 (`PEFTHelper.get_rank_and_scaling`)."""
    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    if module.endswith(".experts.base_layer"):
        module = module.removesuffix("base_layer") + "gate_up_proj"
    elif module.endswith(".experts"):
        module += ".down_proj"
    found = []
    for patterns, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        matches = [v for pattern, v in fields.get(patterns, {}).items() if re.match(rf"(.*\.)?({pattern})$", module)]
        found.append(matches[0] if matches else fields[default])
    return found[0], found[1]


def by_peft(fields: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Rank and alpha of a module or parameter by PEFT's own code."""
    ranks, alphas = fields.get("rank_pattern", {}), fields.get("alpha_pattern", {})
    rank = ranks.get(get_pattern_key(ranks.keys(), name), fields["r"])
    return rank, alphas.get(get_pattern_key(alphas.keys(), name), fields["lora_alpha"])


strengths = st.builds(Strength, st.sampled_from([1, 2, 4, 16]), st.sampled_from([0.5, 8.0, 32.0]))
layers = st.dictionaries(st.sampled_from([*ATTENTION, ROUTER, "experts"]), strengths, min_size=1)


@settings(max_examples=150, deadline=None)
@given(chosen=st.dictionaries(st.sampled_from([0, 1, 2, 10, 11, 21]), layers, min_size=1), down=st.none() | strengths)
def test_peft_and_vllm_find_the_rank_and_alpha_of_every_weight(
    chosen: dict[int, dict[str, Strength]], down: Strength | None
) -> None:
    """Attention, routers, and experts whose ranks differ by projection and by layer, as ranks by use make them."""
    meant: dict[tuple[int, str], Strength] = {}
    for number, layer in chosen.items():
        for name, strength in layer.items():
            meant |= {(number, part): strength for part in (EXPERT_NAMES if name == "experts" else (name,))}
        if "experts" in layer and down is not None:
            meant[number, "down_proj"] = down
    full = {where: module_path(*where) + (".weight" if where[1] == ROUTER else "") for where in meant}
    alike = len({frozenset(name for number, name in meant if number == layer) for layer in chosen}) == 1
    fields = lora_config_fields({full[where]: meant[where] for where in meant}, every_layer=alike, rslora=False)
    for where, strength in meant.items():
        wanted = strength.rank, strength.alpha
        assert by_peft(fields, full[where]) == wanted
        assert by_vllm(fields, factor_keys(*where)[0]) == wanted
