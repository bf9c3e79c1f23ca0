"""The PEFT directory that stock PEFT and vLLM read: both expert projections always, the fields vLLM asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.adapters.layout import PREFIX, Strength, lora_config_fields, to_peft
from finetune.adapters.store import ATTENTION, EXPERTS, ROUTER, AdapterFile, Factors
from finetune.arch import Arch
from finetune.errors import InputError
from finetune.export.factors import largest_rank, layers_of, padded, with_both_projections
from finetune.export.options import ADAPTER_TARGETS

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank takes these (0.33)
Layers = Iterable[tuple[int, Mapping[str, Factors]]]
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
    layers: Layers, *, rslora: bool = False, every_layer: bool = False, rank: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Any set of updates as PEFT and vLLM read it.

    Args:
        layers: layer numbers in order, each with its factors by site name; zeros go beside a lone expert projection.
        rslora: write scales as alpha / sqrt(rank).
        every_layer: these are all layers of the model, each with the same sites (see `lora_config_fields`).
        rank: fill up with zeros to this rank; None: leave ranks as they are.

    Returns:
        Tensors by PEFT's keys, and the fields of its LoraConfig; `write_peft_directory` takes both.
    """
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Strength] = {}
    for number, layer in layers:
        for name, factors in ordered(with_both_projections(dict(layer))):
            factors = padded(factors, rank) if rank else factors
            path = f"model.layers.{number}.{inner_path(name)}"
            key = PREFIX + _module(path, name)
            tensors[f"{key}.lora_A.weight"] = to_peft("a", factors.a)
            tensors[f"{key}.lora_B.weight"] = to_peft("b", factors.b)
            weights[path + (".weight" if name == ROUTER else "")] = _strength(factors, rslora=rslora)
    return tensors, lora_config_fields(weights, every_layer=every_layer, rslora=rslora)


def inner_path(name: str) -> str:
    """Where a site lies in its layer: `self_attn.q_proj`, `mlp.router`, `mlp.experts.down_proj`."""
    return f"self_attn.{name}" if name in ATTENTION else f"mlp.experts.{name}" if name in EXPERTS else f"mlp.{name}"


def ordered(layer: Mapping[str, Factors]) -> Iterable[tuple[str, Factors]]:
    """A layer's sites in the order in which every file here has them."""
    return [(name, layer[name]) for name in (*ATTENTION, ROUTER, *EXPERTS) if name in layer]


def adapts_every_layer(source: AdapterFile, shape: Arch | None) -> bool:
    """Whether the same sites are adapted in every layer of the base.

    Args:
        source: the adapter.
        shape: of its base. None: its own config decides; PEFT adapts a name without a layer in every layer.
    """
    by_layer = {number: {s.name for s in source.sites if s.layer == number} for number in layers_of(source)}
    alike = len({frozenset(names) for names in by_layer.values()}) == 1
    if shape is not None:
        return alike and len(by_layer) == shape.num_layers
    targets = [*_listed(source.config.get("target_modules")), *_listed(source.config.get("target_parameters"))]
    short = not any(".layers." in target for target in targets) and source.config.get("layers_to_transform") is None
    return alike and short and list(by_layer) == list(range(len(by_layer)))


def vllm_line(source: AdapterFile, out: Path) -> str:
    """The command that serves an exported directory with vLLM."""
    base, rank = source.base_name or "BASE", served_rank(largest_rank(source))
    return f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {serving_name(out)}={out.resolve()}"


def serving_name(out: Path) -> str:
    """What a server may call an exported adapter: the run's name where the directory lies in a run, else its own."""
    in_run = out.parent.name == "export" and out.name in ADAPTER_TARGETS
    return out.resolve().parent.parent.name if in_run else out.name


def _listed(targets: object) -> list[str]:
    if isinstance(targets, str):
        return [f".layers.{targets}"]  # a regular expression may say anything about layers
    return [str(target) for target in targets] if isinstance(targets, list | tuple) else []


def _module(path: str, name: str) -> str:
    """The module whose `lora_A` and `lora_B` PEFT writes; it wraps the experts once for each projection."""
    if name not in EXPERTS:
        return path
    return path.removesuffix(f".{name}") + (".base_layer" if name == "gate_up_proj" else "")


def _strength(factors: Factors, *, rslora: bool) -> Strength:
    rank = factors.a.shape[-2]
    alpha = factors.scale * (math.sqrt(rank) if rslora else rank)
    return Strength(rank, float(f"{alpha:.{_ALPHA_DIGITS}g}"))
