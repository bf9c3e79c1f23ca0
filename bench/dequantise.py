"""Dequantising MXFP4 experts against copying as many bytes: `python bench/dequantise.py --help`.

GB/s counts what is read and written. The copy moves the same sum in bfloat16, half read and half written. Goal on a
GPU: 80 % of the copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import interleaved, machine, publish, summary

from finetune.kernels.choice import ExpertDims, triton_obstacle
from finetune.mxfp4.format import dequantise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, help="default: 16 on a GPU, 1 on a CPU")
    parser.add_argument("--out", type=int, default=5760, help="rows of an expert's matrix")
    parser.add_argument("--inputs", type=int, default=2880, help="columns")
    parser.add_argument("--rank", type=int, default=16, help="of the update that the Triton kernel writes beside")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-dequantise-DEVICE.{json,md}")
    args = parser.parse_args()
    device = torch.device(args.device)
    experts = args.experts or (16 if device.type == "cuda" else 1)
    facts = machine(device)
    sizes = (experts, args.out, args.inputs // 32, 16)
    blocks = torch.randint(256, sizes, dtype=torch.uint8, device=device)
    scales = torch.randint(118, 123, sizes[:-1], dtype=torch.uint8, device=device)
    out = torch.empty(experts, args.out, args.inputs, dtype=torch.bfloat16, device=device)
    moved = {"reference": blocks.numel() + scales.numel() + 2 * out.numel()}
    source = torch.empty(moved["reference"] // 4, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    functions: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "reference": lambda: dequantise(blocks, scales, out=out),
    }
    moved["copy"] = 4 * source.numel()
    note = f"{experts} experts of [{args.out}, {args.inputs}] into bfloat16."
    shape = ExpertDims(args.inputs, args.out // 2, experts)
    obstacle = triton_obstacle(shape, device, torch.bfloat16)
    if obstacle is None:
        from finetune.kernels import experts_triton as launch

        bias = torch.randn(experts, args.out, device=device).bfloat16()
        b = torch.randn(experts, args.out, args.rank, device=device)
        augmented = out.new_empty(experts, args.out, args.inputs + launch.padding(args.rank))
        functions["triton"] = lambda: launch.dequantise_augment(blocks, scales, bias, b, augmented)
        moved["triton"] = sum(t.numel() * t.element_size() for t in (blocks, scales, bias, b, augmented))
    else:
        note += f" No triton: {obstacle}."
    seconds = interleaved(functions, args.repeats, device)
    speed = {name: moved[name] / summary(seconds[name])["median_ms"] / 1e6 for name in functions}
    rows = [
        {"path": name, **summary(seconds[name]), "GB/s": round(speed[name], 2),
         "of the copy": round(speed[name] / speed["copy"], 3)}
        for name in functions
    ]  # fmt: skip
    publish(f"dequantise-{device.type}", "Dequantising MXFP4", facts, rows, save=args.save, note=note)


if __name__ == "__main__":
    main()
