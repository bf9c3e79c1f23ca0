"""Targets of an export and the options of the command (no torch: `--help` reads this)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

MergedTarget = Literal["bf16", "mxfp4", "gguf"]
AdapterTarget = Literal["peft", "sglang", "gguf-lora", "mlx"]
MERGED_TARGETS: tuple[MergedTarget, ...] = get_args(MergedTarget)
Rounding = Literal["compensated", "nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
ADAPTER_TARGETS: tuple[AdapterTarget, ...] = get_args(AdapterTarget)
DEFAULT_ROUNDING: Rounding = "compensated"
RECORD = "export.json"
CARD = "README.md"

SUMMARIES: dict[str, str] = {
    "peft": "adapter for PEFT and vLLM",
    "sglang": "adapter for SGLang",
    "gguf-lora": "adapter for llama.cpp",
    "mlx": "adapter for mlx-lm",
    "bf16": "merged checkpoint in bfloat16: vLLM, SGLang, TensorRT-LLM, llama.cpp's converter",
    "mxfp4": "merged checkpoint in the published 4-bit layout; see how much of the update survives",
    "gguf": "merged file for llama.cpp, Ollama, LM Studio",
}


@dataclass(frozen=True)
class ExportOptions:
    """Options of `finetune export`.

    Attributes:
        base: directory or hub name of the base; None: the one the adapter names.
        revision: of a hub name.
        dry_run: print the plan and write nothing.
        verify: open the result in a fresh process and compare it with what it was made from.
        gguf_experts: how a merged GGUF stores experts.
        rounding: how experts go back to MXFP4; None: the default where something is rounded.
        calibration: run or recipe whose training data calibrate compensated rounding; None: the adapter's own run.
        pad_rank: pad the rank to one that vLLM serves (`peft`).
    """

    base: str | None = None
    revision: str | None = None
    dry_run: bool = False
    verify: bool = True
    gguf_experts: Literal["mxfp4", "bf16"] = "bf16"
    rounding: Rounding | None = None
    calibration: str | None = None
    pad_rank: bool = False
