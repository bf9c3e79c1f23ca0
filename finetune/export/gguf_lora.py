"""A llama.cpp adapter in GGUF, experts included: the public converter stops at them, the runtime reads them.

Source: llama.cpp of autumn 2026 (facts: serving.md). The scale at run time is alpha / r: each tensor's own rank, and
one alpha for the file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.store import AdapterFile, Factors
from finetune.export.factors import gate_and_up, layers_of, rescaled
from finetune.export.gguf_file import gguf_package
from finetune.export.peft import ordered

FILE = "adapter.gguf"
_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "router": "ffn_gate_inp",
    "down_proj": "ffn_down_exps",
}


def gguf_lora_tensors(source: AdapterFile) -> tuple[dict[str, Tensor], float]:
    """Everything the file holds.

    Returns:
        Tensors under llama.cpp's names, float32 (attention [r, in] and [out, r], experts with E in front), and the
        alpha that gives every one of them its scale.
    """
    strengths = {site.scale * site.rank for site in source.sites}
    alpha = strengths.pop() if len(strengths) == 1 else float(source.sites[0].rank)
    tensors: dict[str, Tensor] = {}
    for number in layers_of(source):
        for name, factors in ordered(source.layer(number)):
            for tensor, part in _parts(name, factors):
                ready = rescaled(part, alpha / part.a.shape[-2]) if not _exact(part, alpha) else part
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


def gguf_lora_lines(out: Path) -> list[str]:
    """The command that runs the file with llama.cpp."""
    return [
        f"llama-cli -m BASE.gguf --lora {(out / FILE).resolve()}",
        "BASE.gguf: the same base converted by llama.cpp's convert_hf_to_gguf.py; Ollama takes no adapters: merge "
        "with --to gguf for it",
    ]


def _exact(part: Factors, alpha: float) -> bool:
    """Whether alpha / r is the scale but for rounding, so that b need not be touched."""
    return abs(part.scale * part.a.shape[-2] / alpha - 1) < 1e-12


def _parts(name: str, factors: Factors) -> list[tuple[str, Factors]]:
    if name != "gate_up_proj":
        return [(_NAMES[name], factors)]
    gate, up = gate_and_up(factors)
    return [("ffn_gate_exps", gate), ("ffn_up_exps", up)]
