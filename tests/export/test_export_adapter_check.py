"""The check of exported adapters passes correct ones and names errors; its outcome is stored beside the files."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from synthetic_adapter import EXPERTS, SIZES, write_synthetic
from test_export_adapters import export, sites

from finetune.adapters.provenance import BaseRecord
from finetune.adapters.store import AdapterFile
from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.validate import dump_yaml
from finetune.errors import CheckError
from finetune.export.card import attribution_section, base_attributions
from finetune.export.children.adapter import compare
from finetune.export.options import ADAPTER_TARGETS
from finetune.export.verify import verify_adapter

WEIGHTS = {"mlx": "adapters.safetensors", "gguf-lora": "adapter.gguf"}
LAYER = "base_model.model.model.layers.0."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0 whole; of layer 3 only q and down: rank, alpha and rsLoRA's scale differ from site to site."""
    whole = {(0, name): (3 if "p_proj" in name or "down" in name else 2, 4.0) for name in SIZES}
    directory = tmp_path_factory.mktemp("source") / "adapter"
    return write_synthetic(
        directory, whole | {(3, "q_proj"): (1, 5.0), (3, "down_proj"): (2, 1.0)}, rslora=True
    ).directory


@pytest.mark.parametrize("target", ADAPTER_TARGETS)
def test_the_outcome_is_recorded_with_card_and_hashes(
    source: Path, target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(source), "--to", target, "--out", str(out)]) == 0
    assert "act as the source's" in capfd.readouterr().err
    facts = json.loads((out / "export.json").read_text())
    found = facts["verification"]
    # Layer 0: 4 attention + 3 projections of each expert; layer 3: q and each expert's down.
    assert found["sites"] == 4 + 3 * EXPERTS + 1 + EXPERTS
    assert found["kinds"]["gate_proj"] == EXPERTS and found["kinds"]["down_proj"] == 2 * EXPERTS
    assert found["zeros"] == {"peft": 2, "mlx": 2, "sglang": 4, "gguf-lora": 0}[target]
    assert found["max_relative_difference"] <= 1e-5
    assert facts["target"] == target and facts["adapter"]["sha256"] == sha256(source / "adapter_model.safetensors")
    assert facts["files"] == {path.name: sha256(path) for path in out.iterdir() if path.name != "export.json"}
    card = (out / "README.md").read_text()
    assert "a LoRA adapter for" in card and f"{found['sites']} sites" in card and "repeat errors and biases" in card
    assert "merged" not in card and str(tmp_path) not in card, "where it lies on this machine is nobody's business"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sites=sites, rslora=st.booleans(), target=st.sampled_from(ADAPTER_TARGETS), pad=st.booleans())
def test_every_correct_export_passes(
    sites: dict[tuple[int, str], tuple[int, float]], rslora: bool, target: str, pad: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    directory = tmp_path_factory.mktemp("any")
    adapter = write_synthetic(directory / "adapter", sites, rslora=rslora).directory
    qkv = {name for _, name in sites} & {"q_proj", "k_proj", "v_proj"}
    if target == "sglang" and (qkv == {"q_proj"} or (qkv and "q_proj" not in qkv)):
        return  # how wide the others are is not known without the base
    out = export(adapter, target, directory / "out", pad_rank=pad)
    assert compare({"target": target, "directory": str(out), "source": str(adapter)})["problems"] == {}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tampered(source: Path, target: str, out: Path, change: Callable[[Tensors], Any]) -> Path:
    """An export with other tensors, its finetune.json made to fit."""
    export(source, target, out)
    file = out / WEIGHTS.get(target, "adapter_model.safetensors")
    if target == "gguf-lora":
        tensors, alpha = gguf_tensors(source)
        change(tensors)
        file.unlink()
        from finetune.export.targets.gguf_lora import write_gguf_lora

        write_gguf_lora(file, tensors, alpha)
    else:
        tensors = load_file(file)
        change(tensors)
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)
    facts = json.loads((out / "finetune.json").read_text())
    facts["files"][file.name] = sha256(file)
    (out / "finetune.json").write_text(json.dumps(facts))
    return out


def gguf_tensors(source: Path) -> tuple[Tensors, float]:
    from finetune.export.targets.gguf_lora import gguf_lora_tensors

    return gguf_lora_tensors(AdapterFile.open(source))


def problems(source: Path, target: str, out: Path) -> dict[str, str]:
    found: dict[str, str] = compare({"target": target, "directory": str(out), "source": str(source)})["problems"]
    return found


# For each target a B of gate and of up in layer 0 (of expert 1 where experts are apart), and an A of attention.
PLACES = {
    "sglang": (f"{LAYER}mlp.experts.1.gate_proj.lora_B.weight", f"{LAYER}mlp.experts.1.up_proj.lora_B.weight",
               f"{LAYER}self_attn.o_proj.lora_A.weight"),
    "mlx": ("model.layers.0.mlp.experts.gate_proj.lora_b", "model.layers.0.mlp.experts.up_proj.lora_b",
            "model.layers.0.self_attn.o_proj.lora_a"),
    "gguf-lora": ("blk.0.ffn_gate_exps.weight.lora_b", "blk.0.ffn_up_exps.weight.lora_b",
                  "blk.0.attn_output.weight.lora_a"),
    "peft": (f"{LAYER}mlp.experts.base_layer.lora_B.weight", "", f"{LAYER}self_attn.o_proj.lora_A.weight"),
}  # fmt: skip


def swap(tensors: Tensors, gate: str, up: str) -> None:
    if up:
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    else:  # PEFT interleaves them
        tensors[gate] = tensors[gate].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


@pytest.mark.parametrize("target", ADAPTER_TARGETS)
def test_errors_are_named(source: Path, target: str, tmp_path: Path) -> None:
    gate, up, attention = PLACES[target]
    stem = attention.replace(".lora_A.weight", "").replace(".lora_a", "")

    def found(name: str, change: Callable[[Tensors], Any]) -> dict[str, str]:
        return problems(source, target, tampered(source, target, tmp_path / name, change))

    assert found("same", lambda tensors: None) == {}
    swapped = found("swapped", lambda tensors: swap(tensors, gate, up))
    gate_stem = gate.replace(".lora_B.weight", "").replace(".lora_b", "")
    assert "differs from the source" in swapped[gate_stem] and not any("attn" in name for name in swapped)
    scaled = found("scaled", lambda tensors: tensors[attention].mul_(1.001))
    assert list(scaled) == [stem] and "relative difference 0.001" in scaled[stem]
    flipped = found("flipped", lambda tensors: tensors[gate].view(-1)[:1].neg_())
    assert list(flipped) == [gate_stem]
    missing = found("missing", lambda tensors: tensors.pop(attention))
    assert missing == {attention: "missing"}
    unexpected = found("unexpected", lambda tensors: tensors.update({"model.layers.9.x": torch.ones(2)}))
    assert unexpected == {"model.layers.9.x": "unexpected"}
    nan = found("nan", lambda tensors: tensors[gate].view(-1)[-1:].fill_(float("nan")))
    assert nan == {gate: "has values that are not finite"}


@pytest.mark.parametrize("target", ["peft", "sglang", "mlx"])
def test_padding_must_have_no_effect(source: Path, target: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = next(key for key in tensors if "layers.3." in key and ("base_layer" in key or "up_proj" in key))
        for key in (name, name.replace("lora_A", "lora_B").replace("lora_a", "lora_b")):
            tensors[key].fill_(1e-20)

    found = problems(source, target, tampered(source, target, tmp_path / "out", change))
    assert len(found) >= 1 and all("relative difference inf" in problem for problem in found.values())


def test_settings_and_hashes_are_checked(source: Path, tmp_path: Path) -> None:
    """Errors outside the tensors: a scale in the config, a list that a server uses, a file changed later."""
    for target, change, name in (
        ("sglang", {"lora_alpha": 7}, f"{LAYER}self_attn.q_proj"),
        ("sglang", {"target_modules": ["q_proj"]}, "settings"),
        ("sglang", {"use_rslora": True}, "settings"),
        ("mlx", {"num_layers": 2}, "settings"),
        ("peft", {"use_rslora": False}, f"{LAYER}self_attn.q_proj"),
        ("peft", {"target_parameters": []}, "settings"),
        ("peft", {"bias": "all"}, "settings"),
        ("peft", {"use_dora": True}, "settings"),
        ("peft", {"exclude_modules": ["q_proj"]}, "settings"),
        ("peft", {"layers_to_transform": [0]}, "settings"),
        ("peft", {"fan_in_fan_out": True}, "settings"),
        ("peft", {"layer_replication": [[0, 1]]}, "settings"),
        ("peft", {"init_lora_weights": "pissa"}, "settings"),
        ("peft", {"alora_invocation_tokens": [5]}, "settings"),
        ("sglang", {"use_dora": True}, "settings"),
        ("mlx", {"fine_tune_type": "dora"}, "settings"),
    ):
        out = tmp_path / f"{target}-{next(iter(change))}"
        export(source, target, out)
        config = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps(config | change))
        found = problems(source, target, out)
        assert name in found and "sha256" in found["adapter_config.json"], (target, change, found)


ODD: dict[str, Any] = {  # a value that is not the default, for each type of a setting
    "bool": True, "str": "odd", "int": 3, "float": 0.5, "NoneType": {"on": 1}, "dict": {"on": 1}, "list": ["odd"],
}  # fmt: skip
UNREAD = {"task_type", "auto_mapping", "peft_version", "inference_mode", "layers_pattern", "megatron_core",
          "runtime_config", "ensure_weight_tying", "qalora_group_size"}  # fmt: skip


@pytest.mark.parametrize("target", ["peft", "sglang", "mlx"])
def test_every_setting_of_an_export_is_compared(target: str, source: Path, tmp_path: Path) -> None:
    """Each one that is written, and one of a later release, with another value; the check runs without hashes' help."""
    out = export(source, target, tmp_path / "out")
    written = json.loads((out / "adapter_config.json").read_text())
    inside = written.get("lora_parameters", {})
    assert problems(source, target, out) == {}
    damaged = [written | {key: ODD[type(value).__name__]} for key, value in written.items() if key not in UNREAD]
    damaged += [written | {"lora_parameters": inside | {key: ODD[type(inside[key]).__name__]}} for key in inside]
    damaged += [written | {"of_a_later_release": True}]
    for config in damaged:
        changed = {key: value for key, value in config.items() if written.get(key) != value}
        if not changed:  # inference_mode and the like are what the odd value is
            continue
        (out / "adapter_config.json").write_text(json.dumps(config))
        try:
            found = set(problems(source, target, out)) - {"adapter_config.json"}
        except (TypeError, ValueError, AttributeError, KeyError):  # a type that no reader accepts
            continue
        assert found, changed


@pytest.mark.parametrize("target", ["peft", "mlx", "gguf-lora"])
def test_the_router_and_a_lone_gate_up_are_read_correctly(target: str, tmp_path: Path) -> None:
    """PEFT calls a lone gate_up_proj `experts.lora_*`, and a router's weight by the name of its parameter."""
    directory = write_synthetic(tmp_path / "adapter", {(1, "gate_up_proj"): (2, 3.0)}).directory
    tensors = load_file(directory / "adapter_model.safetensors")
    router = "base_model.model.model.layers.1.mlp.router"
    tensors |= {f"{router}.lora_A.weight": torch.randn(5, 8), f"{router}.lora_B.weight": torch.randn(EXPERTS, 5)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    name = "model.layers.1.mlp.router.weight"
    config["target_parameters"] = [*config["target_parameters"], name]
    config["rank_pattern"] = (config.get("rank_pattern") or {}) | {name: 5}
    config["alpha_pattern"] = (config.get("alpha_pattern") or {}) | {name: 11.0}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    found = verify_adapter(AdapterFile.open(directory), target, export(directory, target, tmp_path / "out"))
    zeros = {"peft": 1, "mlx": 1, "gguf-lora": 0}[target]
    kinds = {"router": 1, "gate_proj": EXPERTS, "up_proj": EXPERTS} | ({"down_proj": 0} if zeros else {})
    assert found.kinds == kinds and found.zeros == zeros


def test_a_pattern_that_only_peft_matches_is_found(tmp_path: Path) -> None:
    """vLLM matches a router's pattern with `mlp.router`, PEFT with `mlp.router.weight`: the key has to fit both."""
    directory = write_synthetic(tmp_path / "adapter", {(1, "q_proj"): (2, 3.0)}).directory
    tensors = load_file(directory / "adapter_model.safetensors")
    router = "base_model.model.model.layers.1.mlp.router"
    tensors |= {f"{router}.lora_A.weight": torch.randn(2, 8), f"{router}.lora_B.weight": torch.randn(EXPERTS, 2)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    name = "model.layers.1.mlp.router.weight"
    config |= {"target_parameters": [name]}
    for key, value in (("rank_pattern", 2), ("alpha_pattern", 11.0)):
        config[key] = config[key] | {name: value}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    out = export(directory, "peft", tmp_path / "out")
    exported = json.loads((out / "adapter_config.json").read_text())
    (key,) = exported["alpha_pattern"]
    assert key.endswith(r"mlp.router(\.weight)?")
    assert verify_adapter(AdapterFile.open(directory), "peft", out).kinds["router"] == 1
    exported["alpha_pattern"] = {name: exported["alpha_pattern"][key]}
    (out / "adapter_config.json").write_text(json.dumps(exported))
    assert "vLLM" in problems(directory, "peft", out)[router]


def test_a_wrong_alpha_is_found(source: Path, tmp_path: Path) -> None:
    from finetune.export.targets.gguf_lora import write_gguf_lora

    out = export(source, "gguf-lora", tmp_path / "out")
    tensors, alpha = gguf_tensors(source)
    write_gguf_lora(out / "adapter.gguf", tensors, alpha * 1.01)
    found = problems(source, "gguf-lora", out)
    assert "relative difference 0.01" in found["blk.0.attn_q.weight"] and "sha256" in found["adapter.gguf"]


def test_a_failure_exits_6_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A writer that swaps gate and up is detected by the checking process."""
    from finetune.export.targets import sglang

    parts = sglang.split_gate_up
    monkeypatch.setattr(sglang, "split_gate_up", lambda factors: parts(factors)[::-1])
    out = tmp_path / "out"
    assert main(["export", str(source), "--to", "sglang", "--out", str(out)]) == 6
    errors = capfd.readouterr().err
    assert "layers.0.mlp.experts." in errors and "differs from the source's" in errors
    assert not list(tmp_path.iterdir())
    assert main(["export", str(source), "--to", "sglang", "--out", str(out), "--no-verify"]) == 0
    assert "was not verified (--no-verify)" in capfd.readouterr().err
    assert json.loads((out / "export.json").read_text())["verification"] == {"skipped": "--no-verify"}
    assert "Not verified (--no-verify)" in (out / "README.md").read_text()
    with pytest.raises(CheckError, match="differs from the source"):
        verify_adapter(AdapterFile.open(source), "sglang", out)


def test_the_card_has_the_runs_data_and_recipe(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run / "adapter")
    (run / "config.yaml").write_text(dump_yaml(compose("quickstart", []).config))
    (run / "manifest.json").write_text(json.dumps({"recipe": "quickstart", "total_steps": 12}))
    figures = {"rows": 48, "loss": 2.0, "loss_interval": [1.5, 2.5], "confidence": 0.95}
    (run / "evaluation.json").write_text(json.dumps({"before": figures, "after": figures}))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "my-base")
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["export", str(run), "--to", "mlx"]) == 0
    card = (run / "export" / "mlx" / "README.md").read_text()
    assert "mlx_lm.generate --model my-base --adapter-path ." in card and str(tmp_path) not in card
    assert main(["export", str(run), "--to", "sglang"]) == 0
    card = (run / "export" / "sglang" / "README.md").read_text()
    assert "CC BY 4.0" in card and "12 steps" in card and "2.000 [1.500, 2.500]" in card
    assert "--lora-paths run=." in card and "bfloat16 experts only" in card and "as it was trained" in card


def test_attributions_are_in_the_card(source: Path, tmp_path: Path) -> None:
    """The base's attributions and those of the recipe's data are in the card, and in the card of later exports."""
    base = tmp_path / "my-base"
    base.mkdir()
    (base / "README.md").write_text("# Base\n\n## Attribution\nEmma, by Jane Austen\n\n## Figures\nloss 1\n")
    run = tmp_path / "run"
    shutil.copytree(source, run / "adapter")
    (run / "config.yaml").write_text(dump_yaml(compose("quickstart", []).config))
    (run / "manifest.json").write_text("{}")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["export", str(run), "--to", "mlx"]) == 0
    section = (run / "export" / "mlx" / "README.md").read_text().partition("## Attribution\n")[2].partition("\n## ")[0]
    assert "Emma, by Jane Austen" in section and "loss 1" not in section
    assert "Dan Hendrycks" in section and "CC BY 4.0" in section and "whitespace normalised" in section
    assert "PubMedQA" not in section, "neither base nor recipe used it"
    card = run / "export" / "mlx" / "README.md"
    assert base_attributions(BaseRecord(str(card.parent))) == section.strip()
    (base / "README.md").unlink()
    assert "was not there" in base_attributions(BaseRecord(str(base)))
    assert "openai/gpt-oss-20b" in base_attributions(BaseRecord("openai/gpt-oss-20b", "abc"))
    assert "establish it" in attribution_section(BaseRecord(), ["/data/mine.jsonl"])


def test_mlx_commands_name_the_given_base_quoted(adapter: Path) -> None:
    from finetune.export.targets.mlx import mlx_commands

    command, *notes = mlx_commands(AdapterFile.open(adapter), Path("out"), "a; rm b")
    assert "--model 'a; rm b' --adapter-path" in command and "MXFP4 alone" in notes[0]


def test_mlx_commands_do_not_name_a_bfloat16_base(adapter: Path) -> None:
    from finetune.export.targets.mlx import mlx_commands

    command, note, *_ = mlx_commands(AdapterFile.open(adapter), Path("out"), "big/base-bf16", base_is_packed=False)
    assert "--model MXFP4_BASE " in command and "big/base-bf16 is in bfloat16" in note


@pytest.mark.parametrize("target", ["peft", "sglang", "gguf-lora", "mlx"])
def test_printed_commands_quote_every_name(
    target: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A base or a directory called `; rm -rf ~ #` must not become a command of its own."""
    config = json.loads((source / "adapter_config.json").read_text())
    evil = tmp_path / "adapter"
    shutil.copytree(source, evil)
    (evil / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "x; rm -rf ~ #"}))
    (evil / "finetune.json").unlink(missing_ok=True)
    out = tmp_path / "out; echo hacked"
    assert main(["export", str(evil), "--to", target, "--out", str(out)]) == 0
    (command,) = [line for line in capfd.readouterr().err.splitlines() if str(out.resolve()) in line and " --" in line]
    words = shlex.split(command, comments=True)
    assert any(str(out.resolve()) in word for word in words) and "rm" not in words and "echo" not in words
    (evil / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "x\x1b[31m"}))
    assert main(["export", str(evil), "--to", target, "--out", str(tmp_path / "again")]) == 3
    assert "control characters" in capfd.readouterr().err
