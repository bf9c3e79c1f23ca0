"""mlx-lm's adapter: one rank and one scale for all, gate and up apart, attention's factors transposed.

Source: mlx-lm 0.32.2. It loads factors leniently: names it does not know are left out without a message, so names and
`num_layers` must be right.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.adapters.layout import EXPERTS, path_in_layer
from finetune.adapters.store import AdapterFile
from finetune.arch import layer_prefix
from finetune.export.factors import ordered, padded, rescaled, split_gate_up, with_both_projections
from finetune.kernels.experts import LoraFactors

MLX_WEIGHTS = "adapters.safetensors"
_EVERY_LAYER = -1  # mlx-lm counts `num_layers` from the last layer; 0 and below are all of them


def mlx_tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    """All tensors by mlx-lm's keys, float32: experts a [E, r, in], b [E, out, r]; others a [in, r], b [r, out]."""
    rank, scale = adapter.max_rank, _common_scale(adapter)
    tensors: dict[str, Tensor] = {}
    for number in adapter.layers:
        for name, factors in ordered(with_both_projections(adapter.layer(number))):
            for path, part in _parts(name, factors):
                ready = padded(rescaled(part, scale), rank)
                a, b = (ready.a, ready.b) if ready.a.dim() == 3 else (ready.a.T, ready.b.T)
                tensors[f"{layer_prefix(number)}{path}.lora_a"] = a.contiguous().clone()
                tensors[f"{layer_prefix(number)}{path}.lora_b"] = b.contiguous()
    return tensors


def mlx_config(adapter: AdapterFile) -> dict[str, Any]:
    """The adapter_config.json that goes with `mlx_tensors`."""
    names = {site.name for site in adapter.sites}
    if names & set(EXPERTS):
        names |= set(EXPERTS)
    keys: list[str] = []
    for name in sorted(names):
        keys += ["mlp.experts.gate_proj", "mlp.experts.up_proj"] if name == "gate_up_proj" else [path_in_layer(name)]
    return {
        "fine_tune_type": "lora",
        "num_layers": _EVERY_LAYER,
        "lora_parameters": {
            "rank": adapter.max_rank,
            "scale": _common_scale(adapter),
            "dropout": 0.0,
            "keys": keys,
        },
    }


def mlx_commands(adapter: AdapterFile, out: Path, base: str | None = None, *, base_is_packed: bool = True) -> list[str]:
    """The command that runs the directory with mlx-lm over `base` (None: the recorded one), and notes on it.

    A bfloat16 base is not named in the command: mlx-lm refuses it.
    """
    name = base or adapter.base.name or "BASE"
    model = shlex.quote(name) if base_is_packed else "MXFP4_BASE"
    return [
        f"mlx_lm.generate --model {model} --adapter-path {shlex.quote(str(out.resolve()))} --prompt ...",
        *([] if base_is_packed else [f"MXFP4_BASE: {name} is in bfloat16, whose experts mlx-lm names otherwise"]),
        "mlx-lm 0.32.2 loads gpt-oss in MXFP4 alone: give the MXFP4 checkpoint that a bfloat16 one was made from",
        "mlx-lm 0.32.2 ignores YaRN's truncate: false of gpt-oss's config.json, so logits differ a little from "
        "transformers' (KL about 7e-2), with and without the adapter",
    ]


def _common_scale(adapter: AdapterFile) -> float:
    scales = {site.scale for site in adapter.sites}
    return scales.pop() if len(scales) == 1 else 1.0


def _parts(name: str, factors: LoraFactors) -> list[tuple[str, LoraFactors]]:
    if name != "gate_up_proj":
        return [(path_in_layer(name), factors)]
    gate, up = split_gate_up(factors)
    return [("mlp.experts.gate_proj", gate), ("mlp.experts.up_proj", up)]
