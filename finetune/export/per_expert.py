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

from finetune.errors import InputError
from finetune.export.factors import joined_gate_up, padded, rescaled
from finetune.export.source import Factors, patterned
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
