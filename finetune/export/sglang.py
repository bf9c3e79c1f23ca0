"""SGLang's adapter layout: two-dimensional factors for each expert, one rank, the scale inside B.

Source: SGLang 0.5.23's loader (facts: serving.md). It takes alpha / r as the scale of everything, so alpha = r; joins
gate and up, and q, k and v, itself and needs all of a group; and knows no router.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapters.peft_layout import PREFIX
from finetune.errors import InputError
from finetune.export.factors import gate_and_up, largest_rank, layers_of, padded, rescaled, with_both_projections
from finetune.export.peft import serving_name
from finetune.export.source import ATTENTION, EXPERTS, ROUTER, AdapterSource, Factors
from finetune.model.shapes import ModelShape

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_QKV = ("q_proj", "k_proj", "v_proj")


def sglang_tensors(source: AdapterSource, shape: ModelShape | None) -> dict[str, Tensor]:
    """All tensors under SGLang's keys, float32.

    Args:
        source: the adapter.
        shape: of its base, which knows how wide the zeros for k and v are; None if it is not known.

    Raises:
        InputError: the adapter changes the router, or zeros are needed and nothing says how wide.
    """
    if any(site.name == ROUTER for site in source.sites):
        raise InputError(
            f"{source.directory} adapts the router, which SGLang's LoRA does not serve",
            fix="merge it instead: --to bf16",
        )
    rank = largest_rank(source)
    tensors: dict[str, Tensor] = {}
    for number in layers_of(source):
        path = f"{PREFIX}model.layers.{number}."
        layer = with_both_projections(source.layer(number))
        layer |= _missing_qkv(source, number, shape)
        for name in ATTENTION:
            if name in layer:
                _put(tensors, f"{path}self_attn.{name}", _ready(layer[name], rank))
        if layer.keys() & set(EXPERTS):
            parts = (*gate_and_up(layer["gate_up_proj"]), layer["down_proj"])
            for name, factors in zip(EXPERT_PROJECTIONS, (_ready(part, rank) for part in parts), strict=True):
                for expert in range(len(factors.a)):
                    one = Factors(factors.a[expert], factors.b[expert], factors.scale)
                    _put(tensors, f"{path}mlp.experts.{expert}.{name}", one)
    return tensors


def sglang_config(source: AdapterSource) -> dict[str, Any]:
    """The adapter_config.json that goes with `sglang_tensors`."""
    names = {site.name for site in source.sites}
    groups = [*(_QKV if names & set(_QKV) else ()), *(("o_proj",) if "o_proj" in names else ())]
    rank = largest_rank(source)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base_name,
        "revision": source.base_revision,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [*groups, *(EXPERT_PROJECTIONS if names & set(EXPERTS) else ())],
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def sglang_lines(source: AdapterSource, out: Path) -> list[str]:
    """The command that serves the directory, and on which base."""
    experts = any(site.name in EXPERTS for site in source.sites)
    base = "BF16_BASE" if experts else source.base_name or "BASE"
    backend = " --moe-runner-backend triton" if experts else ""
    adapter = f"--enable-lora --lora-paths {serving_name(out)}={out.resolve()}"
    lines = [f"python -m sglang.launch_server --model-path {base} {adapter}{backend}"]
    if experts:
        lines.append(
            "BF16_BASE: SGLang takes LoRA on experts over bfloat16 experts only; give it the base in bfloat16 (same "
            "values, four times the memory of MXFP4)"
        )
    return lines


def _missing_qkv(source: AdapterSource, number: int, shape: ModelShape | None) -> dict[str, Factors]:
    """Zeros for those of q, k and v that a layer does not adapt beside one that it does."""
    here = [site for site in source.sites if site.layer == number and site.name in _QKV]
    missing = [name for name in _QKV if here and source.site(number, name) is None]
    widths = {site.name: site.out for site in source.sites if site.name in _QKV}
    for one, twin in (("k_proj", "v_proj"), ("v_proj", "k_proj")):
        if twin in widths:
            widths.setdefault(one, widths[twin])  # equally wide
    if shape is not None:
        widths |= {"q_proj": shape.query_size, "k_proj": shape.kv_size, "v_proj": shape.kv_size}
    if unknown := [name for name in missing if name not in widths]:
        raise InputError(
            f"{source.directory} adapts {here[0].name} without {unknown[0]}, and SGLang wants q, k and v together",
            why="how wide the zeros for it are is not in the adapter",
            fix="give the base with --base",
        )
    return {name: Factors(torch.zeros(1, here[0].inputs), torch.zeros(widths[name], 1), 1.0) for name in missing}


def _ready(factors: Factors, rank: int) -> Factors:
    return padded(rescaled(factors, 1.0), rank)


def _put(tensors: dict[str, Tensor], path: str, factors: Factors) -> None:
    # Experts of a stack share memory, which safetensors refuses.
    tensors[f"{path}.lora_A.weight"] = factors.a.clone()
    tensors[f"{path}.lora_B.weight"] = factors.b.clone()
