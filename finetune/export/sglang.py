"""Adapters with factors expert by expert, such as SGLang's: `mlp.experts.{e}.{gate,up,down}_proj.lora_{A,B}.weight`.

gate and up may have an A each; they become one update of gate_up_proj. Experts without factors get zeros.

Shape legend: E experts, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.adapters.layout import PREFIX
from finetune.adapters.store import ATTENTION, EXPERTS, ROUTER, AdapterFile, Factors, patterned
from finetune.arch import Arch
from finetune.errors import InputError
from finetune.export.factors import (
    gate_and_up,
    joined_gate_up,
    largest_rank,
    layers_of,
    padded,
    rescaled,
    with_both_projections,
)
from finetune.export.peft import serving_name
from finetune.model.headers import read_header

_EXPERT_KEY = re.compile(r"\.mlp\.experts\.\d+\.")
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>model\.layers\.(?P<layer>\d+)\."
    r"(?:self_attn\.(?P<attention>[qkvo]_proj)|mlp\.(?P<router>router)"
    r"|mlp\.experts\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj|gate_up_proj)))"
    r"\.lora_(?P<factor>[AB])\.weight"
)


@dataclass(frozen=True)
class _Pair:
    """One 2-D pair in the file: of an attention projection, the router (expert None), or one expert's projection."""

    layer: int
    name: str
    expert: int | None
    scale: float
    key_a: str
    key_b: str


def holds_per_expert_keys(keys: Iterable[str]) -> bool:
    """Whether a file numbers its experts."""
    return any(_EXPERT_KEY.search(key) for key in keys)


@dataclass(frozen=True)
class PerExpertFile:
    """A checked file; factors are read layer by layer.

    Attributes:
        path: the safetensors file.
        num_experts: E, from the highest expert that has factors.
        layers: layer numbers in it.
    """

    path: Path
    num_experts: int
    layers: tuple[int, ...]
    pairs: tuple[_Pair, ...]

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any], num_experts: int | None) -> PerExpertFile:
        """Check a file from its header.

        Args:
            path: the file.
            config: the adapter_config.json beside it.
            num_experts: of the base, if known: experts at the end may have no factors.

        Raises:
            InputError: keys of another kind, a factor without its other half, or ranks that differ from the config's.
        """
        shapes = {name: entry.shape for name, entry in read_header(path).items()}
        pairs = _pairs(shapes, config, path)
        highest = max(pair.expert for pair in pairs if pair.expert is not None)
        if num_experts is not None and highest >= num_experts:
            raise InputError(f"{path} has factors of expert {highest}, and the base has {num_experts} experts")
        return cls(path, num_experts or highest + 1, tuple(sorted({pair.layer for pair in pairs})), pairs)

    def layer(self, number: int) -> dict[str, Factors]:
        """One layer's factors by our site names, experts stacked.

        Raises:
            InputError: experts of one projection have different sizes, or a value is not finite.
        """
        found: dict[str, Factors] = {}
        stacks: dict[str, dict[int, Factors]] = {}
        with safe_open(self.path, framework="pt") as file:
            for pair in self.pairs:
                if pair.layer != number:
                    continue
                factors = Factors(_read(file, pair.key_a, self.path), _read(file, pair.key_b, self.path), pair.scale)
                if pair.expert is None:
                    found[pair.name] = factors
                else:
                    stacks.setdefault(pair.name, {})[pair.expert] = factors
        stacked = {name: self._stack(experts, f"{name} of layer {number}") for name, experts in stacks.items()}
        if "down_proj" in stacked:
            found["down_proj"] = stacked["down_proj"]
        if gate_up := _gate_up(stacked):
            found["gate_up_proj"] = gate_up
        return found

    def _stack(self, experts: dict[int, Factors], what: str) -> Factors:
        """[r, in] and [out, r] of some experts as [E, r, in] and [E, out, r]; ranks are filled up with zeros."""
        rank = max(len(factors.a) for factors in experts.values())
        scales = {factors.scale for factors in experts.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        sizes = {(factors.a.shape[1], factors.b.shape[0]) for factors in experts.values()}
        if len(sizes) > 1:
            raise InputError(f"{self.path}: experts' {what} have different sizes: {sorted(sizes)}")
        ((inputs, out),) = sizes
        a, b = torch.zeros(self.num_experts, rank, inputs), torch.zeros(self.num_experts, out, rank)
        for expert, factors in experts.items():
            ready = padded(rescaled(factors, scale), rank)
            a[expert], b[expert] = ready.a, ready.b
        return Factors(a, b, scale)


def _gate_up(stacked: Mapping[str, Factors]) -> Factors | None:
    """gate_up_proj from its halves; a missing half gets zeros."""
    if "gate_up_proj" in stacked:
        return stacked["gate_up_proj"]
    gate, up = stacked.get("gate_proj"), stacked.get("up_proj")
    known = gate or up
    if known is None:
        return None
    zeros = Factors(known.a, torch.zeros_like(known.b), known.scale)
    gate, up = gate or zeros, up or zeros
    return joined_gate_up(gate, rescaled(up, gate.scale))


def _pairs(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: Path) -> tuple[_Pair, ...]:
    keys: dict[str, dict[str, re.Match[str]]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{where} holds {key}, which is no LoRA factor of gpt-oss that can be imported")
        keys.setdefault(match["path"], {})[match["factor"]] = match
    pairs = []
    for path, factors in sorted(keys.items()):
        if factors.keys() != {"A", "B"}:
            raise InputError(f"{where} holds {next(iter(factors.values()))[0]} without its other factor")
        a, b = factors["A"][0], factors["B"][0]
        rank = int(patterned(config, "rank_pattern", "r", path))
        alpha = float(patterned(config, "alpha_pattern", "lora_alpha", path))
        flat = len(shapes[a]) == len(shapes[b]) == 2
        if not flat or not shapes[a][0] == shapes[b][1] == rank:
            raise InputError(
                f"{where}: {a} {list(shapes[a])} and {b} {list(shapes[b])} are no pair of rank {rank}",
                fix="use the adapter_config.json that was written with the tensors",
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        match = factors["A"]
        expert = None if match["expert"] is None else int(match["expert"])
        name = match["attention"] or match["router"] or match["projection"]
        pairs.append(_Pair(int(match["layer"]), name, expert, scale, a, b))
    return tuple(pairs)


def _read(file: Any, key: str, path: Path) -> Tensor:
    factor: Tensor = file.get_tensor(key).float()
    if not factor.isfinite().all():
        raise InputError(f"{path}: {key} holds values that are not finite")
    return factor


# SGLang's adapter layout: two-dimensional factors for each expert, one rank, the scale inside B.
#
# Source: SGLang 0.5.23's loader (facts: serving.md). It takes alpha / r as the scale of everything, so alpha = r; joins
# gate and up, and q, k and v, itself and needs all of a group; and knows no router.

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_QKV = ("q_proj", "k_proj", "v_proj")


def sglang_tensors(source: AdapterFile, shape: Arch | None) -> dict[str, Tensor]:
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


def sglang_config(source: AdapterFile) -> dict[str, Any]:
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


def sglang_lines(source: AdapterFile, out: Path) -> list[str]:
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


def _missing_qkv(source: AdapterFile, number: int, shape: Arch | None) -> dict[str, Factors]:
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
