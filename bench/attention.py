"""Attention with sinks: flash against the reference, and the cost of the sinks: `python bench/attention.py --help`.

Packed sequences with the published heads (64 and 8 of 64), full and sliding layers; forward and backward timed apart.
`difference` is the largest relative RMS difference of output and gradients from the float32 reference, same inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import interleaved, machine, peak_bytes, publish, summary
from torch import Tensor

from finetune.kernels.attention import plan_attention, sink_attention
from finetune.kernels.flash import CpuFlash, CudaFlash, FlashPlan, flash_sink_attention


def kernel_alone(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, plan: Any, scaling: float) -> Tensor:
    """The flash kernel without sinks, forward only."""
    kernel = CudaFlash() if q.is_cuda else CpuFlash()
    return kernel.forward(q, k, v, FlashPlan(plan.packed, plan.window, scaling))[0]


def relative(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative RMS difference."""
    pairs = zip(ours, exact, strict=True)
    return max(((a.double() - b.double()).square().mean() / b.double().square().mean()).sqrt().item() for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the sequence")
    parser.add_argument(
        "--segment", type=int, default=700, help="tokens of an example; the sequence is filled with them"
    )
    parser.add_argument("--heads", type=int, nargs=3, default=(64, 8, 64), metavar=("QUERY", "KEY", "WIDTH"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--flash-impl", choices=["FA3", "FA4"], help="activate this one in torch, if it is installed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-attention.{json,md}")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.flash_impl:
        torch.nn.attention.activate_flash_attention_impl(args.flash_impl)
    facts = machine(device)
    torch.manual_seed(0)
    heads, key_heads, width = args.heads
    shapes = [(args.tokens, count, width) for count in (heads, key_heads, key_heads)]
    leaves = [torch.randn(shape, device=device).to(dtype) for shape in (*shapes, (heads,))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grad_out = torch.randn(shapes[0], device=device).to(dtype)
    index = torch.arange(args.tokens)
    rows = []
    for layer, window in (("full", None), ("sliding 128", 128)):
        plan = plan_attention((index // args.segment)[None], (index % args.segment)[None], window).to(device)
        rows += measure_layer(layer, leaves, grad_out, plan, args.repeats)
    note = (
        f"{args.tokens:,} tokens in examples of {args.segment}, heads {heads}/{key_heads} of {width}, "
        f"{str(dtype).removeprefix('torch.')}."
    )
    publish("attention", "Attention with sinks", facts, rows, save=args.save, note=note)


def measure_layer(layer: str, leaves: list[Tensor], grad_out: Tensor, plan: Any, repeats: int) -> list[dict[str, Any]]:
    """Lines of the table for one kind of layer."""
    scaling, device = leaves[0].shape[-1] ** -0.5, leaves[0].device
    exact_leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    out = sink_attention(*exact_leaves, plan, scaling)
    exact = [out.detach(), *torch.autograd.grad(out, exact_leaves, grad_out.float())]
    attentions = {"reference": sink_attention, "flash": flash_sink_attention}
    outputs = {name: attention(*leaves, plan, scaling) for name, attention in attentions.items()}
    forward: dict[str, Callable[[], object]] = {
        name: lambda attention=attention: attention(*leaves, plan, scaling)
        for name, attention in (attentions | {"flash without sinks": kernel_alone}).items()
    }
    backward: dict[str, Callable[[], object]] = {
        name: lambda out=out: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
        for name, out in outputs.items()
    }
    seconds, backward_seconds = interleaved(forward, repeats, device), interleaved(backward, repeats, device)
    rows = []
    for name in forward:
        row = {"layer": layer, "kernel": name, "forward ms": summary(seconds[name])["median_ms"]}
        if name in backward:
            both = [outputs[name].detach(), *backward[name]()]
            row |= {
                "backward ms": summary(backward_seconds[name])["median_ms"],
                "peak MB": round(
                    peak_bytes(lambda n=name: torch.autograd.grad(forward[n](), leaves, grad_out), device) / 1e6, 1
                ),
                "difference": relative(both, exact),
            }
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
