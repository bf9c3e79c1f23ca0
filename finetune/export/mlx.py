"""mlx-lm's adapter: one rank and one scale for all, gate and up apart, attention's factors transposed.

Source: mlx-lm 0.32.2 (facts: serving.md). It loads factors leniently: what it does not know it leaves out without a
word, so names and `num_layers` must be right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.adapters.store import AdapterFile, Factors
from finetune.export.factors import gate_and_up, largest_rank, layers_of, padded, rescaled, with_both_projections
from finetune.export.peft import inner_path, ordered

MLX_WEIGHTS = "adapters.safetensors"
_EVERY_LAYER = -1  # mlx-lm counts `num_layers` from the last layer; 0 and below are all of them


def mlx_tensors(source: AdapterFile) -> dict[str, Tensor]:
    """All tensors under mlx-lm's keys, float32: experts a [E, r, in], b [E, out, r]; others a [in, r], b [r, out]."""
    rank, scale = largest_rank(source), _common_scale(source)
    tensors: dict[str, Tensor] = {}
    for number in layers_of(source):
        for name, factors in ordered(with_both_projections(source.layer(number))):
            for path, part in _parts(name, factors):
                ready = padded(rescaled(part, scale), rank)
                a, b = (ready.a, ready.b) if ready.a.dim() == 3 else (ready.a.T, ready.b.T)
                tensors[f"model.layers.{number}.{path}.lora_a"] = a.contiguous().clone()
                tensors[f"model.layers.{number}.{path}.lora_b"] = b.contiguous()
    return tensors


def mlx_config(source: AdapterFile) -> dict[str, Any]:
    """The adapter_config.json that goes with `mlx_tensors`."""
    names = {site.name for site in source.sites}
    if names & {"gate_up_proj", "down_proj"}:
        names |= {"gate_up_proj", "down_proj"}
    keys: list[str] = []
    for name in sorted(names):
        keys += ["mlp.experts.gate_proj", "mlp.experts.up_proj"] if name == "gate_up_proj" else [inner_path(name)]
    return {
        "fine_tune_type": "lora",
        "num_layers": _EVERY_LAYER,
        "lora_parameters": {
            "rank": largest_rank(source),
            "scale": _common_scale(source),
            "dropout": 0.0,
            "keys": keys,
        },
    }


def mlx_lines(source: AdapterFile, out: Path) -> list[str]:
    """The command that runs the directory with mlx-lm."""
    base = source.base_name or "BASE"
    return [
        f"mlx_lm.generate --model {base} --adapter-path {out.resolve()} --prompt ...",
        "mlx-lm 0.32.2 ignores YaRN's truncate: false of gpt-oss's config.json, so logits differ a little from "
        "transformers' (KL about 7e-2), with and without the adapter",
    ]


def _common_scale(source: AdapterFile) -> float:
    scales = {site.scale for site in source.sites}
    return scales.pop() if len(scales) == 1 else 1.0


def _parts(name: str, factors: Factors) -> list[tuple[str, Factors]]:
    if name != "gate_up_proj":
        return [(inner_path(name), factors)]
    gate, up = gate_and_up(factors)
    return [("mlp.experts.gate_proj", gate), ("mlp.experts.up_proj", up)]
