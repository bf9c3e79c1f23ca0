"""Oracle for serving layouts: each file as updates, by the formulas that its server publishes.

Written without any line of finetune. `READERS` gives each target's updates as float64 [out, in], or [E, out, in] for
experts; `unflatten` cuts PEFT's flattened factors into those of each expert.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from synthetic_adapter import EXPERTS, HIDDEN, SIZES, WIDTH, Synthetic
from torch import Tensor

Updates = dict[tuple[int, str], Tensor]
"""(layer, weight name) -> update."""


def unflatten(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's A [E·r, in] and B [out, r·E] as [E, r, in] and [E, out, r]."""
    rank = len(a) // experts
    return a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts).permute(2, 0, 1)


def read_peft(directory: Path) -> Updates:
    """As PEFT and vLLM read it; the scale of a name is the first pattern that ends it, else the default."""
    tensors = {k: t.double() for k, t in load_file(directory / "adapter_model.safetensors").items()}
    config = json.loads((directory / "adapter_config.json").read_text())
    updates = {}
    for key in tensors:
        if not key.endswith("lora_A.weight"):
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer, a, b = int(path.split(".")[2]), tensors[key], tensors[key.replace("lora_A", "lora_B")]
        if path.endswith("experts.base_layer"):
            path = path.replace("base_layer", "gate_up_proj")
        elif path.endswith("experts"):
            path += ".down_proj"

        def setting(patterns: str, default: str, path: str = path) -> float:
            found = [v for name, v in config.get(patterns, {}).items() if path == name or path.endswith(f".{name}")]
            return found[0] if found else config[default]

        rank = int(setting("rank_pattern", "r"))
        scale = setting("alpha_pattern", "lora_alpha") / (rank**0.5 if config["use_rslora"] else rank)
        if "experts" in path:
            a, b = unflatten(a, b, len(a) // rank)
            updates[layer, path.rpartition(".")[2]] = torch.einsum("eor,eri->eoi", b, a) * scale
        else:
            assert len(a) == rank
            updates[layer, path.rpartition(".")[2]] = b @ a * scale
    return updates


def read_sglang(directory: Path) -> Updates:
    """2-D factors of each expert; alpha / r for all; gate and up are interleaved by the server."""
    tensors = {k: t.double() for k, t in load_file(directory / "adapter_model.safetensors").items()}
    config = json.loads((directory / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    assert not config.get("use_rslora") and not config.get("rank_pattern") and not config.get("alpha_pattern")
    updates: Updates = {}
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        assert a.shape[0] == config["r"]
        parts = key.removeprefix("base_model.model.model.layers.").removesuffix(".lora_A.weight").split(".")
        assert parts[-1] in config["target_modules"]
        layer, update = int(parts[0]), tensors[key.replace("lora_A", "lora_B")] @ a * scale
        if parts[1] == "self_attn":
            updates[layer, parts[2]] = update
            continue
        name = "down_proj" if parts[4] == "down_proj" else "gate_up_proj"
        stack = updates.setdefault((layer, name), torch.full((EXPERTS, *SIZES[name]), float("nan"), dtype=torch.double))
        rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2), "down_proj": slice(None)}[parts[4]]
        stack[int(parts[3]), rows] = update
    return updates


def read_mlx(directory: Path) -> Updates:
    """mlx-lm: experts stacked, attention's factors transposed, one rank and scale."""
    tensors = {k: t.double() for k, t in load_file(directory / "adapters.safetensors").items()}
    parameters = json.loads((directory / "adapter_config.json").read_text())["lora_parameters"]
    updates: Updates = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_a"):
            continue
        layer, path = key.removeprefix("model.layers.").removesuffix(".lora_a").split(".", 1)
        assert path in parameters["keys"], "mlx-lm leaves out what is not listed, without a message"
        b, name = tensors[key.replace("lora_a", "lora_b")], path.rpartition(".")[2]
        assert a.shape[1] == parameters["rank"]
        if "experts" not in path:
            updates[int(layer), name] = (a @ b).T * parameters["scale"]
        else:
            _place(updates, int(layer), name, torch.einsum("eor,eri->eoi", b, a) * parameters["scale"])
    return updates


def read_gguf_lora(directory: Path) -> Updates:
    """llama.cpp: experts stacked, alpha of the file over each tensor's own rank."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(directory / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["general.architecture"] == "gpt-oss"
    assert fields["adapter.type"] == "lora"
    tensors = {t.name: torch.tensor(np.array(t.data)).double() for t in reader.tensors}
    names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    names |= {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
    updates: Updates = {}
    for key, a in tensors.items():
        if key.endswith(".lora_a"):
            _, layer, name, _, _ = key.split(".")
            b = tensors[key.replace("lora_a", "lora_b")]
            _place(updates, int(layer), names[name], b @ a * (fields["adapter.lora.alpha"] / b.shape[-1]))
    return updates


def _place(updates: Updates, layer: int, name: str, update: Tensor) -> None:
    """Put an update in; gate's rows are the even ones of gate_up_proj, up's the odd ones."""
    if name not in ("gate_proj", "up_proj"):
        updates[layer, name] = update
        return
    shape = (EXPERTS, 2 * WIDTH, HIDDEN)
    whole = updates.setdefault((layer, "gate_up_proj"), torch.full(shape, float("nan"), dtype=torch.double))
    whole[:, slice(0 if name == "gate_proj" else 1, None, 2)] = update


READERS = {"peft": read_peft, "sglang": read_sglang, "mlx": read_mlx, "gguf-lora": read_gguf_lora}


def assert_same_updates(found: Updates, adapter: Synthetic) -> None:
    """Equal updates where there were any, zeros wherever else the file has something."""
    assert adapter.updates.keys() <= found.keys()
    for site, update in found.items():
        wanted = adapter.updates.get(site, torch.zeros_like(update))
        assert update.shape == wanted.shape
        error = (update - wanted).abs().max() / (wanted.abs().max() or 1)
        assert error < 1e-6, f"{site}: {error}"
