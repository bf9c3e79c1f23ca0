"""One layer's experts with LoRA, forward and backward: `python bench/expert_block.py --help`.

The kernels of `model.expert_kernel` beside a naive path over the same packed weights (dequantises three times, bias and
update as passes of their own) and PEFT's `target_parameters` on transformers' experts in dense weights. All have the
same random inputs, weights and factors in one process, in turn; `difference` is the largest relative RMS difference of
output and gradients from the reference's. What PEFT keeps for its backward pass the others compute again. Memory is
that of the step alone, without weights and factors: allocated on a GPU, tensors alive on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, machine, peak_bytes, publish, summary
from naive_experts import PeftExperts, naive_block
from torch import Tensor

from finetune.kernels.choice import ExpertDims, expert_block_of, triton_obstacle
from finetune.kernels.experts import ExpertWeights, LoraFactors, Mxfp4Experts

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from allocation import AllocationTracker

SHAPES = {  # experts, hidden, width, experts a token, experts a chunk, tokens
    "tiny": (8, 64, 64, 2, 8, 128),
    "small": (32, 512, 512, 4, 8, 512),
    "20b": (32, 2880, 2880, 4, 16, 16384),
    "120b": (128, 2880, 2880, 4, 8, 16384),
}


class Layer:
    """Random packed weights, factors and inputs, made on the device."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        experts, hidden, width, top_k, chunk, tokens = SHAPES[args.shape]
        tokens, chunk = args.tokens or tokens, args.chunk or chunk
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype, self.top_k = device, dtype, top_k
        self.weights = ExpertWeights(
            self._packed(experts, 2 * width, hidden), self._packed(experts, hidden, width), 7.0, 1.702, chunk
        )
        self.ids = self._random(tokens, experts).topk(top_k).indices
        sizes = [(experts, args.rank, hidden), (experts, 2 * width, args.rank)]
        sizes += [(experts, args.rank, width), (experts, hidden, args.rank)]
        leaves = [self._random(tokens, hidden).to(dtype), self._random(tokens, top_k).softmax(-1).to(dtype)]
        leaves += [self._random(*size) * size[-1] ** -0.5 for size in sizes]
        self.leaves = [leaf.requires_grad_() for leaf in leaves]
        self.grad_out = self._random(tokens, hidden).to(dtype)
        factors = self.leaves[2:]
        self.lora = LoraFactors(factors[0], factors[1], 2.0), LoraFactors(factors[2], factors[3], 2.0)
        self.shape = ExpertDims(hidden, width, chunk)
        self.note = (
            f"{tokens:,} tokens to {top_k} of {experts} experts, {hidden} -> {width}, {chunk} experts a chunk, "
            f"rank {args.rank}, {str(dtype).removeprefix('torch.')}, factors in float32."
        )

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator, device=self.device)

    def _packed(self, experts: int, out: int, inputs: int) -> Mxfp4Experts:
        sizes, more = (experts, out, inputs // 32, 16), {"device": self.device, "generator": self.generator}
        blocks = torch.randint(256, sizes, dtype=torch.uint8, **more)
        scales = torch.randint(118, 123, sizes[:-1], dtype=torch.uint8, **more)
        return Mxfp4Experts(blocks, scales, (self._random(experts, out) * 0.1).to(self.dtype))

    def blocks(self, names: list[str]) -> dict[str, Callable[[], Tensor]]:
        """Forward passes by name."""

        def call(block: Callable[..., Tensor]) -> Callable[[], Tensor]:
            return lambda: block(self.leaves[0], self.ids, self.leaves[1], self.weights, *self.lora)

        made: dict[str, Callable[[], Tensor]] = {}
        for name in names:
            if name == "peft":
                peft = PeftExperts(self.weights, self.lora, self.top_k)
                made[name] = lambda peft=peft: peft(self.leaves[0], self.ids, self.leaves[1])
            else:
                made[name] = call(naive_block if name == "naive" else expert_block_of(name))
        return made


def step(layer: Layer, forward: Callable[[], Tensor]) -> list[Tensor]:
    """Output, and gradients of x and the router weights; those of the factors go to `.grad`, as in training."""
    for leaf in layer.leaves:
        leaf.grad = None
    out = forward()
    out.backward(layer.grad_out)
    return [out.detach(), *(leaf.grad for leaf in layer.leaves if leaf.grad is not None)]


def measure(layer: Layer, names: list[str], repeats: int) -> list[dict[str, Any]]:
    forwards = layer.blocks(names)
    exact = step(layer, layer.blocks(["reference"])["reference"])
    with torch.no_grad():
        forward = interleaved(forwards, repeats, layer.device)
    both = interleaved({name: lambda f=f: step(layer, f) for name, f in forwards.items()}, repeats, layer.device)
    rows = []
    for name in names:
        ours = step(layer, forwards[name])  # PEFT's own factors: output and the gradients of x and mix are compared
        forward_ms, both_ms = summary(forward[name])["median_ms"], summary(both[name])["median_ms"]
        rows.append(
            {
                "block": name,
                "forward ms": forward_ms,
                "forward + backward ms": both_ms,
                "least": summary(both[name])["least_ms"],
                "most": summary(both[name])["most_ms"],
                "peak MB": round(peak(layer, forwards[name]) / 1e6, 1),
                "difference": max(relative(a, b) for a, b in zip(ours, exact, strict=False)),
            }
        )
    medians = {row["block"]: row["forward + backward ms"] for row in rows}
    for row in rows:
        row["x reference"] = round(row["forward + backward ms"] / medians["reference"], 2)
    return rows


def peak(layer: Layer, forward: Callable[[], Tensor]) -> int:
    """Peak bytes of a step above those allocated before it."""
    if layer.device.type == "cuda":
        return peak_bytes(lambda: step(layer, forward), layer.device)
    with AllocationTracker() as tracker:
        step(layer, forward)
    return tracker.peak_bytes


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).square().mean() / exact.double().square().mean()).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--tokens", type=int, help="of the micro-batch; default by shape")
    parser.add_argument("--chunk", type=int, help="experts a chunk; default by shape")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", nargs="+", choices=["triton", "reference", "naive", "peft"], help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-expert-block-SHAPE.{json,md}")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    facts = machine(device)
    layer = Layer(args, device, dtype)
    names = args.blocks or ["reference", "naive", "peft", "triton"]
    if "reference" not in names:
        names.insert(0, "reference")  # what the others are compared with
    obstacle = triton_obstacle(layer.shape, device, dtype)
    if "triton" in names and obstacle is not None:
        names.remove("triton")
        layer.note += f" No triton: {obstacle}."
    rows = measure(layer, names, args.repeats)
    publish(f"expert-block-{args.shape}", "Expert block", facts, rows, save=args.save, note=layer.note)


if __name__ == "__main__":
    main()
