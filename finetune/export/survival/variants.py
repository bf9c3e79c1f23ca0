"""One live model turned into each way of serving an adapter: base, base + adapter, merges of all kinds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from finetune.adapters.attach import attach_for_merge
from finetune.adapters.layout import ATTENTION, EXPERTS, ROUTER
from finetune.adapters.lora import LoraLinear
from finetune.arch import router_path
from finetune.export.plan import MergePlan, Operation
from finetune.kernels.experts import LoraFactors, clamped_swiglu
from finetune.model.build import Base
from finetune.model.experts import PUBLISHED_SIGMOID_GAIN, PackedExperts
from finetune.mxfp4.format import dequantise
from finetune.rounding.merge import merge_weight
from finetune.rounding.nearest import nearest_by_rule, round_experts, seeded_noise
from finetune.rounding.results import RoundedExperts

NAMES = {
    "base": "base",
    "adapter": "base + adapter",
    "bf16": "merged, bf16",
    "nearest": "MXFP4, nearest",
    "nearest, floor scales": "MXFP4, nearest, floor scales",
    "nearest, ceil scales": "MXFP4, nearest, ceil scales",
    "stochastic": "MXFP4, stochastic",
    "compensated": "MXFP4, compensated",
}
Packed = tuple[Tensor, Tensor, Tensor | None]  # blocks, scales, and the bias if it changed


class MergedExperts(nn.Module):
    """Experts with their update added and rounded to bfloat16, as a merged bf16 checkpoint has them.

    Weights are made expert by expert when they are needed, so that nothing larger than one is in memory.

    Args:
        packed: the base's experts.
        factors: updates by projection.
    """

    def __init__(self, packed: PackedExperts, factors: dict[str, LoraFactors]) -> None:
        super().__init__()
        self.packed, self.factors = packed, factors

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """[T, D], int64 [T, K], [T, K] -> [T, D], as `PackedExperts`."""
        out = torch.zeros_like(hidden_states)
        for expert in router_indices.unique().tolist():
            tokens, slots = (router_indices == expert).nonzero(as_tuple=True)
            gate_up = self._linear("gate_up_proj", expert, hidden_states[tokens])
            inner = clamped_swiglu(gate_up, self.packed.limit, PUBLISHED_SIGMOID_GAIN)
            rows = self._linear("down_proj", expert, inner) * routing_weights[tokens, slots, None]
            out.index_add_(0, tokens, rows)
        return out

    def _linear(self, name: str, expert: int, rows: Tensor) -> Tensor:
        blocks, scales, bias = (getattr(self.packed, f"{name}_{part}") for part in ("blocks", "scales", "bias"))
        weight = dequantise(blocks[expert], scales[expert], torch.float32)
        if name in self.factors:
            own = self.factors[name]
            weight = torch.addmm(weight, own.b[expert], own.a[expert], alpha=own.scale)
        return rows @ weight.to(torch.bfloat16).to(rows.dtype).T + bias[expert]


class Variants:
    """A live base that can become any of `NAMES`.

    Args:
        base: without an adapter.
        plan: a native plan, for its adapter and base.
        rounded: experts that were rounded with compensation; None: that variant is missing.
    """

    def __init__(self, base: Base, plan: MergePlan, rounded: RoundedExperts | None) -> None:
        self.base, self.plan, self.rounded = base, plan, rounded
        layers = base.model.model.layers
        self._plain = [{name: getattr(layer.self_attn, name) for name in ATTENTION} for layer in layers]
        self._weights = [{name: module.weight.data for name, module in plain.items()} for plain in self._plain]
        self._routers = [(layer.mlp.router.weight.data, layer.mlp.router.bias.data) for layer in layers]
        self._experts: list[PackedExperts] = [layer.mlp.experts for layer in layers]

    def names(self) -> list[str]:
        """Variants that can be made, in the order of `NAMES`."""
        return [name for name in NAMES if name != "compensated" or self.rounded is not None]

    @torch.no_grad()
    def become(self, name: str) -> None:
        """Make the model a variant."""
        self._restore()
        if name == "base":
            return
        if name == "adapter":
            attach_for_merge(self.base, self.plan.adapter)
            return
        self._merge_dense()
        if name == "bf16":
            for number, experts in enumerate(self._experts):
                self.base.model.model.layers[number].mlp.experts = MergedExperts(experts, self._expert_factors(number))
            return
        for operation in self.plan.operations:
            if operation.kind == "round experts":
                self._install(operation, self._rounding(name))

    def _restore(self) -> None:
        for number, layer in enumerate(self.base.model.model.layers):
            for name, module in self._plain[number].items():
                module.weight.data = self._weights[number][name]
                setattr(layer.self_attn, name, module)
            layer.mlp.router.weight.data, layer.mlp.router.bias.data = self._routers[number]
            layer.mlp.experts = self._experts[number]
            self._experts[number].lora = None
        for operation in self.plan.operations:
            if operation.kind == "round experts":
                stem = operation.base.removesuffix("_blocks")
                blocks, scales, bias = (
                    self.plan.checkpoint.read(stem + end) for end in ("_blocks", "_scales", "_bias")
                )
                self._write(operation, (blocks, scales, bias))

    def _merge_dense(self) -> None:
        """Attention and router as every merged checkpoint has them: added in float32, one cast to bfloat16."""
        for number, layer in enumerate(self.base.model.model.layers):
            for name, found in self.plan.adapter.layer(number).items():
                module = layer.mlp.router if name == ROUTER else self._plain[number].get(name)
                if module is not None and not isinstance(module, LoraLinear):
                    on_device = LoraFactors(found.a.to(self.base.device), found.b.to(self.base.device), found.scale)
                    merged = merge_weight(module.weight.data, on_device)[0].to(module.weight.dtype)
                    module.weight.data = merged
            change = self.plan.adapter.router_bias.get(f"{router_path(number)}.bias")
            if change is not None:
                bias = layer.mlp.router.bias
                merged_bias = bias.float() + change.to(self.base.device)
                bias.data = merged_bias.to(torch.bfloat16).to(bias.dtype)

    def _expert_factors(self, number: int) -> dict[str, LoraFactors]:
        device = self.base.device
        found = {name: part for name, part in self.plan.adapter.layer(number).items() if name in EXPERTS}
        return {name: LoraFactors(part.a.to(device), part.b.to(device), part.scale) for name, part in found.items()}

    def _install(self, operation: Operation, make: Callable[[Operation, Tensor, Tensor, LoraFactors], Packed]) -> None:
        assert operation.site is not None
        stem = operation.base.removesuffix("_blocks")
        blocks, scales = (self.plan.checkpoint.read(stem + end) for end in ("_blocks", "_scales"))
        self._write(operation, make(operation, blocks, scales, self.plan.adapter.read(operation.site)))

    def _write(self, operation: Operation, parts: Packed) -> None:
        assert operation.site is not None
        experts = self._experts[operation.site.layer]
        for end, part in zip(("blocks", "scales", "bias"), parts, strict=True):
            if part is not None:  # never written into: on a CPU a buffer may be the mapped file itself
                name = f"{operation.site.name}_{end}"
                buffer = experts.get_buffer(name)
                setattr(experts, name, part.to(buffer.device, buffer.dtype))

    def _rounding(self, name: str) -> Callable[[Operation, Tensor, Tensor, LoraFactors], Packed]:
        def compensated(operation: Operation, *_: object) -> Packed:
            assert self.rounded is not None
            stem = operation.base.removesuffix("_blocks")
            blocks, scales, bias = (self.rounded.read(stem + end) for end in ("_blocks", "_scales", "_bias"))
            return blocks, scales, bias

        def nearest(_operation: Operation, blocks: Tensor, scales: Tensor, factors: LoraFactors) -> Packed:
            return *round_experts(blocks, scales, factors)[:2], None

        def stochastic(operation: Operation, blocks: Tensor, scales: Tensor, factors: LoraFactors) -> Packed:
            noise = seeded_noise(self.plan.checkpoint, operation.base, 0)
            return *round_experts(blocks, scales, factors, noise)[:2], None

        def by_rule(_operation: Operation, blocks: Tensor, scales: Tensor, factors: LoraFactors) -> Packed:
            return *nearest_by_rule(blocks, scales, factors, "floor" if "floor" in name else "ceil"), None

        if name == "compensated":
            return compensated
        return {"nearest": nearest, "stochastic": stochastic}.get(name, by_rule)
