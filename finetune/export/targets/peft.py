"""The PEFT directory that stock PEFT and vLLM read: both expert projections always, the fields vLLM asks for."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.adapters.layout import ROUTER, Strength, lora_config_fields, module_path
from finetune.adapters.store import AdapterFile, peft_tensors
from finetune.arch import Arch
from finetune.errors import InputError
from finetune.export.factors import Layer, ordered, padded, with_both_projections
from finetune.export.options import ADAPTER_TARGETS
from finetune.kernels.experts import LoraFactors

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank takes these (0.33)
_ALPHA_DIGITS = 12  # alpha is recovered as scale x rank, and 5 / 3 x 3 is not 5


def served_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM that an adapter of this rank fits.

    Raises:
        InputError: it serves none as high.
    """
    fitting = [served for served in SERVED_RANKS if served >= rank]
    if not fitting:
        raise InputError(
            f"rank {rank} is above {SERVED_RANKS[-1]}, the highest that vLLM serves",
            fix=f"`finetune adapter combine DIR:1 --rank {SERVED_RANKS[-1]} --out NEW` lowers it and prints the error",
        )
    return fitting[0]


def peft_contents(
    layers: Iterable[tuple[int, Layer]], *, rslora: bool = False, every_layer: bool = False, rank: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Any set of updates as PEFT and vLLM read it.

    Args:
        layers: layer numbers in order, each with its factors by weight name; a lone expert projection gets zeros
            beside it.
        rslora: write scales as alpha / sqrt(rank).
        every_layer: these are all layers of the model, each with the same sites (see `lora_config_fields`).
        rank: pad to this rank with zeros; None: leave ranks as they are.

    Returns:
        Tensors by PEFT's keys, and the fields of its LoraConfig; `write_directory` takes both.
    """
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Strength] = {}
    for number, layer in layers:
        for name, factors in ordered(with_both_projections(layer)):
            factors = padded(factors, rank) if rank else factors
            tensors |= peft_tensors([(number, name, factors)])
            weights[module_path(number, name) + (".weight" if name == ROUTER else "")] = _strength(factors, rslora)
    return tensors, lora_config_fields(weights, every_layer=every_layer, rslora=rslora)


def adapts_every_layer(adapter: AdapterFile, arch: Arch | None) -> bool:
    """Whether the same sites are adapted in every layer of the base.

    Args:
        adapter: opened.
        arch: of its base. None: its own config decides; PEFT adapts a name without a layer in every layer.
    """
    by_layer = {number: {s.name for s in adapter.sites if s.layer == number} for number in adapter.layers}
    alike = len({frozenset(names) for names in by_layer.values()}) == 1
    if arch is not None:
        return alike and len(by_layer) == arch.num_layers
    settings = adapter.config.settings
    targets = [*_as_list(settings.get("target_modules")), *_as_list(settings.get("target_parameters"))]
    short = not any(".layers." in target for target in targets) and settings.get("layers_to_transform") is None
    return alike and short and list(by_layer) == list(range(len(by_layer)))


def vllm_commands(adapter: AdapterFile, out: Path) -> list[str]:
    """The command that serves an exported directory with vLLM, and a note on releases that would scale it wrongly."""
    base, rank = shlex.quote(adapter.base.name or "BASE"), served_rank(adapter.max_rank)
    lora = shlex.quote(f"{serving_name(out)}={out.resolve()}")
    lines = [f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {lora}"]
    if len({site.scale for site in adapter.sites}) > 1:
        lines.append(
            "this adapter scales its weights differently: vLLM 0.32 and 0.33 read rank_pattern and alpha_pattern, "
            "older ones scale all alike without a message"
        )
    return lines


def serving_name(out: Path) -> str:
    """The name a server gives an exported adapter: the run's if the directory is in a run, else the directory's."""
    in_run = out.parent.name == "export" and out.name in ADAPTER_TARGETS
    return out.resolve().parent.parent.name if in_run else out.name


def _as_list(targets: object) -> list[str]:
    if isinstance(targets, str):
        return [f".layers.{targets}"]  # a regular expression may match any layers
    return [str(target) for target in targets] if isinstance(targets, list | tuple) else []


def _strength(factors: LoraFactors, rslora: bool) -> Strength:
    rank = factors.a.shape[-2]
    alpha = factors.scale * (math.sqrt(rank) if rslora else rank)
    return Strength(rank, float(f"{alpha:.{_ALPHA_DIGITS}g}"))
