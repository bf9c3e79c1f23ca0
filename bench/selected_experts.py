"""LoRA on some of a layer's experts: cost of the others' routed tokens. `python bench/selected_experts.py --help`.

For each number of adapted experts the same updates twice: on those experts alone, as in training, and on all experts
with zeros for the others, which computes the same. Floating-point operations are counted in the running step (forward
and backward), those of dequantising left out; `LoRA GFLOP` is what a step has beyond one without updates. Tokens choose
experts at random, and evenly. Ranks that differ are compared at equal parameters: the mean is `--rank`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from expert_block import SHAPES, Layer, relative
from measure import interleaved, machine, publish, summary
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from finetune.adapters.sites import ranks_by_use
from finetune.kernels.choice import expert_block_of
from finetune.kernels.dispatch import LoraExperts, LoraRanks
from finetune.kernels.experts import LoraFactors

SCALE = 2.0
SHARES = (0.125, 0.25, 0.5, 1.0)


def grouped_flops(rows: Any, matrices: Any, *_: Any, **__: Any) -> int:
    """Of `grouped_mm`, which torch's counter does not know, from the shapes of its arguments."""
    return int(2 * rows[0] * rows[1] * matrices[-1])


def gflop(work: Callable[[], object]) -> float:
    """Multiplications and additions in matrix products, in 1e9."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops}) as counter:
        work()
    return counter.get_total_flops() / 1e9


class Case:
    """A layer with updates on the first experts of every few; `expanded`: the same as factors of all experts."""

    def __init__(self, layer: Layer, block: Callable[..., Tensor], count: int, ranks: list[int] | None = None) -> None:
        experts = len(layer.weights.gate_up.bias)
        self.layer, self.block = layer, block
        self.numbers = tuple(range(0, experts, experts // count))[:count]
        self.index = torch.tensor(self.numbers, device=layer.device)
        whole = [leaf.detach() for leaf in layer.leaves[2:]]
        self.adapted = LoraExperts(self.numbers, self.index)
        if ranks is None:
            self.factors = [factor[self.index] for factor in whole]
            self.expanded = [torch.zeros_like(f).index_copy(0, self.index, f[self.index]) for f in whole]
        else:
            laid = LoraRanks.of(tuple(ranks), (SCALE,) * len(ranks), layer.device)
            self.adapted = LoraExperts(self.numbers, self.index, laid)
            widths = (whole[0].shape[2], whole[1].shape[1], whole[2].shape[2], whole[3].shape[1])
            self.factors = [layer._random(sum(ranks), width) * width**-0.5 for width in widths]
            every = slice(0, len(ranks))
            made = [laid.expand(factor, every) for factor in self.factors]
            self.expanded = [f if number % 2 == 0 else f.transpose(1, 2).contiguous() for number, f in enumerate(made)]

    def step(self, *, skip: bool) -> list[Tensor]:
        """Output, and gradients of input and router weights, after a forward and a backward pass."""
        factors = [f.detach().requires_grad_() for f in (self.factors if skip else self.expanded)]
        scale = 1.0 if skip and self.adapted.ranks is not None else SCALE
        updates = LoraFactors(factors[0], factors[1], scale), LoraFactors(factors[2], factors[3], scale)
        x, mix = (leaf.detach().requires_grad_() for leaf in self.layer.leaves[:2])
        adapted = self.adapted if skip else None
        out = self.block(x, self.layer.ids, mix, self.layer.weights, *updates, adapted)
        out.backward(self.layer.grad_out)
        assert x.grad is not None and mix.grad is not None
        return [out.detach(), x.grad, mix.grad]


def measure(cases: dict[str, Case], base_gflop: float, repeats: int) -> list[dict[str, Any]]:
    layer = next(iter(cases.values())).layer
    calls = {(name, skip): lambda c=c, s=skip: c.step(skip=s) for name, c in cases.items() for skip in (True, False)}
    seconds = interleaved({f"{name} {skip}": call for (name, skip), call in calls.items()}, repeats, layer.device)
    rows = []
    for name, case in cases.items():
        ours, zeros = (case.step(skip=skip) for skip in (True, False))
        rows.append(
            {
                "adapted": name,
                "LoRA GFLOP": round(gflop(calls[name, True]) - base_gflop, 3),
                "with zeros": round(gflop(calls[name, False]) - base_gflop, 3),
                "ms": summary(seconds[f"{name} True"])["median_ms"],
                "ms with zeros": summary(seconds[f"{name} False"])["median_ms"],
                "difference": max(relative(a, b) for a, b in zip(ours, zeros, strict=True)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--tokens", type=int, help="of the micro-batch; default by shape")
    parser.add_argument("--chunk", type=int, help="experts a chunk; default by shape")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--block", choices=["triton", "reference"], help="default: triton on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-selected-experts-SHAPE.{json,md}")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    facts, layer = machine(device), Layer(args, device, dtype)
    name = args.block or ("triton" if device.type == "cuda" else "reference")
    block, experts = expert_block_of(name), len(layer.weights.gate_up.bias)
    counts = sorted({max(1, round(experts * share)) for share in SHARES})
    cases = {f"{count} of {experts} experts": Case(layer, block, count) for count in counts}
    use = [1 / (number + 1) for number in range(experts)]
    ranks = ranks_by_use(use, args.rank * experts, 4 * args.rank)
    cases[f"{experts} experts of ranks {min(ranks)} to {max(ranks)}"] = Case(layer, block, experts, ranks)

    def without() -> None:
        x, mix = (leaf.detach().requires_grad_() for leaf in layer.leaves[:2])
        block(x, layer.ids, mix, layer.weights, None, None).backward(layer.grad_out)

    base = gflop(without)
    layer.note += f" {name} block; without updates a step has {base:.3f} GFLOP."
    rows = measure(cases, base, args.repeats)
    publish(f"selected-experts-{args.shape}", "LoRA on some experts", facts, rows, save=args.save, note=layer.note)


if __name__ == "__main__":
    main()
