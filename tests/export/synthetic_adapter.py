"""Adapters of any sites, ranks and scales, written by hand in PEFT's layout, with their updates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

EXPERTS, HIDDEN, WIDTH, QUERIES, KEYS = 3, 8, 12, 10, 6
SIZES = {  # out, in
    "q_proj": (QUERIES, HIDDEN),
    "k_proj": (KEYS, HIDDEN),
    "v_proj": (KEYS, HIDDEN),
    "o_proj": (HIDDEN, QUERIES),
    "gate_up_proj": (2 * WIDTH, HIDDEN),
    "down_proj": (HIDDEN, WIDTH),
}
Sites = Mapping[tuple[int, str], tuple[int, float]]


@dataclass(frozen=True)
class Synthetic:
    directory: Path
    updates: dict[tuple[int, str], Tensor]  # float64, [out, in] or [E, out, in]


def path_of(layer: int, name: str) -> str:
    return (
        f"model.layers.{layer}."
        + (f"mlp.experts.{name}" if "p_proj" in name or "down" in name else "")
        + (f"self_attn.{name}" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "")
    )


def write_synthetic(directory: Path, sites: Sites, *, rslora: bool = False, seed: int = 0) -> Synthetic:
    """`sites`: (layer, name) -> (rank, alpha), every name written in full."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    updates = {}
    ranks, alphas = {}, {}
    for (layer, name), (rank, alpha) in sites.items():
        out, inputs = SIZES[name]
        scale = alpha / (rank**0.5 if rslora else rank)
        ranks[path_of(layer, name)], alphas[path_of(layer, name)] = rank, alpha
        key = f"base_model.model.{path_of(layer, name)}"
        if name in ("gate_up_proj", "down_proj"):
            a = torch.randn(EXPERTS * rank, inputs, generator=generator)
            b = torch.randn(out, rank * EXPERTS, generator=generator)
            experts = (a.reshape(EXPERTS, rank, inputs).double(), b.reshape(out, rank, EXPERTS).double())
            updates[layer, name] = torch.einsum("eri,ore->eoi", *experts) * scale  # the facts' formula
            inner = name == "gate_up_proj" and (layer, "down_proj") in sites
            key = key.removesuffix(f".{name}") + (".base_layer" if inner else "")
        else:
            a = torch.randn(rank, inputs, generator=generator)
            b = torch.randn(out, rank, generator=generator)
            updates[layer, name] = b.double() @ a.double() * scale
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 77,
        "lora_alpha": 77,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": rslora,
        "target_modules": [path_of(*site) for site in sites if "attn" in path_of(*site)],
        "target_parameters": [path_of(*site) for site in sites if "experts" in path_of(*site)],
        "base_model_name_or_path": "some/base",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return Synthetic(directory, updates)
