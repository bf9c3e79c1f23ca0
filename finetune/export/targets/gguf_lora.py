"""A llama.cpp adapter in GGUF, experts included: the public converter stops at them, the runtime reads them.

Source: llama.cpp of autumn 2026. The scale at run time is alpha / r: each tensor's own rank, and one alpha for the
file.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.store import AdapterFile
from finetune.export.factors import ordered, rescaled, split_gate_up
from finetune.export.targets.gguf import gguf_package
from finetune.kernels.experts import LoraFactors

FILE = "adapter.gguf"
_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "router": "ffn_gate_inp",
    "down_proj": "ffn_down_exps",
}


def gguf_lora_tensors(adapter: AdapterFile) -> tuple[dict[str, Tensor], float]:
    """The contents of the file.

    Returns:
        Tensors by llama.cpp's names, float32 (attention [r, in] and [out, r], experts with E in front), and the alpha
        that gives every one of them its scale.
    """
    strengths = {site.scale * site.rank for site in adapter.sites}
    alpha = strengths.pop() if len(strengths) == 1 else float(adapter.sites[0].rank)
    tensors: dict[str, Tensor] = {}
    for number in adapter.layers:
        for name, factors in ordered(adapter.layer(number)):
            for tensor, part in _parts(name, factors):
                ready = part if _has_alpha(part, alpha) else rescaled(part, alpha / part.a.shape[-2])
                path = f"blk.{number}.{tensor}.weight"
                tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = ready.a, ready.b
    return tensors, alpha


def write_gguf_lora(path: Path, tensors: dict[str, Tensor], alpha: float) -> None:
    """Write the file.

    Raises:
        MachineError: the `gguf` package is not installed.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, arch="gpt-oss")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_lora_commands(out: Path) -> list[str]:
    """The command that runs the file with llama.cpp, and a note on it."""
    return [
        f"llama-cli -m BASE.gguf --lora {shlex.quote(str((out / FILE).resolve()))}",
        "BASE.gguf: the same base converted by llama.cpp's convert_hf_to_gguf.py; Ollama takes no adapters: merge "
        "with --to gguf for it",
    ]


def _has_alpha(part: LoraFactors, alpha: float) -> bool:
    """Whether alpha / r is the scale up to rounding, so that b need not change."""
    return abs(part.scale * part.a.shape[-2] / alpha - 1) < 1e-12


def _parts(name: str, factors: LoraFactors) -> list[tuple[str, LoraFactors]]:
    if name != "gate_up_proj":
        return [(_NAMES[name], factors)]
    gate, up = split_gate_up(factors)
    return [("ffn_gate_exps", gate), ("ffn_up_exps", up)]
