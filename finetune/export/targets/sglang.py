"""SGLang's adapter layout, written and read: two-dimensional factors for each expert.

Keys are `mlp.experts.{e}.{gate,up,down}_proj.lora_{A,B}.weight`. Written by SGLang 0.5.23's loader: it takes alpha / r
as the scale of everything, so alpha = r and the scale is inside B; one rank for all; it joins gate and up, and q, k and
v, itself and needs all of a group; and it does not serve a router. `PerExpertFile` reads files of other tools in this
layout: gate and up may have an A each, and experts without factors get zeros.

Shape legend: E experts, r rank.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.adapters.config_file import PeftConfig
from finetune.adapters.layout import (
    ATTENTION,
    EXPERTS,
    PREFIX,
    ROUTER,
    unfit_pair,
)
from finetune.adapters.store import AdapterFile
from finetune.arch import Arch, layer_prefix
from finetune.errors import InputError
from finetune.export.factors import join_gate_up, padded, part_of, rescaled, split_gate_up, with_both_projections
from finetune.export.targets.peft import serving_name
from finetune.kernels.experts import LoraFactors
from finetune.model.headers import read_header

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_QKV = ("q_proj", "k_proj", "v_proj")
_EXPERT_KEY = re.compile(r"\.mlp\.experts\.\d+\.")
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>model\.layers\.(?P<layer>\d+)\."
    r"(?:self_attn\.(?P<attention>[qkvo]_proj)|mlp\.(?P<router>router)"
    r"|mlp\.experts\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj|gate_up_proj)))"
    r"\.lora_(?P<factor>[AB])\.weight"
)


def sglang_tensors(adapter: AdapterFile, arch: Arch | None) -> dict[str, Tensor]:
    """All tensors by SGLang's keys, float32.

    Args:
        adapter: opened.
        arch: of its base, which gives the widths of the zeros for k and v; None if it is not known.

    Raises:
        InputError: the adapter changes the router, or zeros are needed whose width is not known.
    """
    if any(site.name == ROUTER for site in adapter.sites):
        raise InputError(
            f"{adapter.directory} adapts the router, which SGLang's LoRA does not serve",
            fix="merge it instead: --to bf16",
        )
    rank = adapter.max_rank
    tensors: dict[str, Tensor] = {}
    for number in adapter.layers:
        path = PREFIX + layer_prefix(number)
        layer = with_both_projections(adapter.layer(number)) | _missing_qkv(adapter, number, arch)
        for name in ATTENTION:
            if name in layer:
                _put(tensors, f"{path}self_attn.{name}", _ready(layer[name], rank))
        if layer.keys() & set(EXPERTS):
            parts = (*split_gate_up(layer["gate_up_proj"]), layer["down_proj"])
            for name, factors in zip(EXPERT_PROJECTIONS, (_ready(part, rank) for part in parts), strict=True):
                for expert in range(len(factors.a)):
                    _put(tensors, f"{path}mlp.experts.{expert}.{name}", part_of(factors, expert))
    return tensors


def sglang_config(adapter: AdapterFile) -> dict[str, Any]:
    """The adapter_config.json that goes with `sglang_tensors`."""
    names = {site.name for site in adapter.sites}
    groups = [*(_QKV if names & set(_QKV) else ()), *(("o_proj",) if "o_proj" in names else ())]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "r": adapter.max_rank,
        "lora_alpha": adapter.max_rank,
        "target_modules": [*groups, *(EXPERT_PROJECTIONS if names & set(EXPERTS) else ())],
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def sglang_commands(adapter: AdapterFile, out: Path) -> list[str]:
    """The command that serves the directory, and a note on the base it needs."""
    experts = any(site.name in EXPERTS for site in adapter.sites)
    base = "BF16_BASE" if experts else shlex.quote(adapter.base.name or "BASE")
    backend = " --moe-runner-backend triton" if experts else ""
    options = "--enable-lora --lora-paths " + shlex.quote(f"{serving_name(out)}={out.resolve()}")
    lines = [f"python -m sglang.launch_server --model-path {base} {options}{backend}"]
    if experts:
        lines.append(
            "BF16_BASE: SGLang takes LoRA on experts over bfloat16 experts only; give it the base in bfloat16 (same "
            "values, four times the memory of MXFP4)"
        )
    return lines


def _missing_qkv(adapter: AdapterFile, number: int, arch: Arch | None) -> dict[str, LoraFactors]:
    """Zeros for those of q, k and v that a layer does not adapt beside one that it does."""
    here = [site for site in adapter.sites if site.layer == number and site.name in _QKV]
    missing = [name for name in _QKV if here and adapter.site(number, name) is None]
    widths = {site.name: site.out for site in adapter.sites if site.name in _QKV}
    for one, twin in (("k_proj", "v_proj"), ("v_proj", "k_proj")):
        if twin in widths:
            widths.setdefault(one, widths[twin])  # equally wide
    if arch is not None:
        widths |= {"q_proj": arch.query_size, "k_proj": arch.kv_size, "v_proj": arch.kv_size}
    if unknown := [name for name in missing if name not in widths]:
        raise InputError(
            f"{adapter.directory} adapts {here[0].name} without {unknown[0]}, and SGLang wants q, k and v together",
            why="the width of the zeros for it is not in the adapter",
            fix="give the base with --base",
        )
    return {n: LoraFactors(torch.zeros(1, here[0].inputs), torch.zeros(widths[n], 1), 1.0) for n in missing}


def _ready(factors: LoraFactors, rank: int) -> LoraFactors:
    return padded(rescaled(factors, 1.0), rank)


def _put(tensors: dict[str, Tensor], path: str, factors: LoraFactors) -> None:
    # Experts of a stack share memory, which safetensors refuses.
    tensors[f"{path}.lora_A.weight"] = factors.a.clone()
    tensors[f"{path}.lora_B.weight"] = factors.b.clone()


# ---- reading files with factors for each expert


@dataclass(frozen=True)
class _Pair:
    """One 2-D pair in the file: of an attention projection, the router (expert None), or one expert's projection."""

    layer: int
    name: str
    expert: int | None
    scale: float
    key_a: str
    key_b: str


def has_per_expert_keys(keys: Iterable[str]) -> bool:
    """Whether a file's keys number the experts."""
    return any(_EXPERT_KEY.search(key) for key in keys)


@dataclass(frozen=True)
class PerExpertFile:
    """A checked file; factors are read layer by layer.

    Attributes:
        path: the safetensors file.
        num_experts: E of the base, or from the highest expert that has factors.
        layers: layer numbers in it.
    """

    path: Path
    num_experts: int
    layers: tuple[int, ...]
    pairs: tuple[_Pair, ...]

    @classmethod
    def open(cls, path: Path, config: PeftConfig, num_experts: int | None) -> PerExpertFile:
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

    def layer(self, number: int) -> dict[str, LoraFactors]:
        """One layer's factors by weight name, experts stacked.

        Raises:
            InputError: experts of one projection have different sizes, or a value is not finite.
        """
        found: dict[str, LoraFactors] = {}
        stacks: dict[str, dict[int, LoraFactors]] = {}
        with safe_open(self.path, framework="pt") as file:
            for pair in self.pairs:
                if pair.layer != number:
                    continue
                a, b = (_read(file, key, self.path) for key in (pair.key_a, pair.key_b))
                if pair.expert is None:
                    found[pair.name] = LoraFactors(a, b, pair.scale)
                else:
                    stacks.setdefault(pair.name, {})[pair.expert] = LoraFactors(a, b, pair.scale)
        stacked = {name: self._stack(experts, f"{name} of layer {number}") for name, experts in stacks.items()}
        if "down_proj" in stacked:
            found["down_proj"] = stacked["down_proj"]
        if gate_up := _gate_up(stacked):
            found["gate_up_proj"] = gate_up
        return found

    def _stack(self, experts: dict[int, LoraFactors], what: str) -> LoraFactors:
        """[r, in] and [out, r] of some experts as [E, r, in] and [E, out, r]; ranks are padded with zeros."""
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
        return LoraFactors(a, b, scale)


def _gate_up(stacked: Mapping[str, LoraFactors]) -> LoraFactors | None:
    """gate_up_proj from its halves; a missing half gets zeros."""
    if "gate_up_proj" in stacked:
        return stacked["gate_up_proj"]
    gate, up = stacked.get("gate_proj"), stacked.get("up_proj")
    known = gate or up
    if known is None:
        return None
    zeros = LoraFactors(known.a, torch.zeros_like(known.b), known.scale)
    gate, up = gate or zeros, up or zeros
    return join_gate_up(gate, rescaled(up, gate.scale))


def _pairs(shapes: Mapping[str, tuple[int, ...]], config: PeftConfig, where: Path) -> tuple[_Pair, ...]:
    keys: dict[str, dict[str, re.Match[str]]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{where} has {key}, which is no LoRA factor of gpt-oss that can be imported")
        keys.setdefault(match["path"], {})[match["factor"]] = match
    pairs = []
    for path, factors in sorted(keys.items()):
        if factors.keys() != {"A", "B"}:
            raise InputError(f"{where} has {next(iter(factors.values()))[0]} without its other factor")
        a, b = factors["A"][0], factors["B"][0]
        rank = config.rank(path)
        flat = len(shapes[a]) == len(shapes[b]) == 2
        if not flat or not shapes[a][0] == shapes[b][1] == rank or rank < 1:
            raise unfit_pair(where, a, b, shapes, rank)
        match = factors["A"]
        expert = None if match["expert"] is None else int(match["expert"])
        name = match["attention"] or match["router"] or match["projection"]
        pairs.append(_Pair(int(match["layer"]), name, expert, config.scale(path, rank), a, b))
    return tuple(pairs)


def _read(file: Any, key: str, path: Path) -> Tensor:
    factor: Tensor = file.get_tensor(key).float()
    if not factor.isfinite().all():
        raise InputError(f"{path}: {key} has values that are not finite")
    return factor
