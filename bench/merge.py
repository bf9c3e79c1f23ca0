"""Merge throughput beside `cp`, and peak memory at several depths: `python bench/merge.py --help`.

Random tensors of a published model's own shapes, with fewer layers and a small vocabulary: a merge's speed and memory
depend on a layer's size. Each merge is a fresh process with the command a user types (verification off); `cp -r` then
copies its result on the same disk, and both end with what they wrote on the disk (`sync`). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune.arch import Arch
from finetune.config.paths import shipped_dir
from finetune.model.checkpoint import Checkpoint
from finetune.model.identity import checkpoint_identity

RUN = """
import json, sys, time
from finetune.cli.main import main
from finetune.export.targets import merged
seconds = {}
def timed(name, function):
    def call(*args, **named):
        started, spent = time.perf_counter(), time.process_time()
        try: return function(*args, **named)
        finally:
            seconds[name] = time.perf_counter() - started
            seconds[name + "_cpu"] = time.process_time() - spent
    return call
merged.check_base = timed("check", merged.check_base)
merged.write_shards = timed("write", merged.write_shards)
merged.write_gguf = timed("write", merged.write_gguf)
def peak_kib():  # not getrusage: its figure starts at the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
code = main(sys.argv[1:])
print("MEASURED " + json.dumps({"code": code, "peak_kib": peak_kib()} | seconds))
"""


def write_base(directory: Path, size: str, layers: int, vocabulary: int) -> None:
    config = json.loads((shipped_dir("data") / "tokenizer" / f"gpt-oss-{size}" / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers], "vocab_size": vocabulary}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shape = Arch.from_config(config, "config.json")
    generator = torch.Generator().manual_seed(0)
    weight_map, groups = {}, {}
    for name, (dtype, sizes) in shape.expected_tensors().items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        groups.setdefault(part, {})[name] = (dtype, sizes)
    for number, tensors in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({n: _random(n, *entry, generator) for n, entry in tensors.items()}, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _random(name: str, dtype: str, sizes: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if dtype == "U8":
        low, high = (118, 124) if name.endswith("_scales") else (0, 256)
        return torch.randint(low, high, sizes, dtype=torch.uint8, generator=generator)
    return (torch.randn(sizes, generator=generator) * 0.02).to(torch.bfloat16)


def write_adapter(directory: Path, base: Path, rank: int) -> None:
    checkpoint = Checkpoint.open(base)
    shape, tensors = checkpoint.arch, {}
    generator = torch.Generator().manual_seed(1)
    for layer in range(shape.num_layers):
        prefix = f"base_model.model.model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out, inputs = checkpoint.tensor_shape(f"model.layers.{layer}.self_attn.{name}.weight")
            _pair(tensors, f"{prefix}self_attn.{name}", rank, inputs, out, generator)
        flat = rank * shape.num_experts
        _pair(tensors, f"{prefix}mlp.experts.base_layer", flat, shape.hidden, 2 * shape.expert_width, generator)
        _pair(tensors, f"{prefix}mlp.experts", flat, shape.expert_width, shape.hidden, generator)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": str(base.resolve())}
    config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    (directory / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))


def _pair(
    tensors: dict[str, torch.Tensor], name: str, rank: int, inputs: int, out: int, generator: torch.Generator
) -> None:
    tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.02
    tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.005


def measure(base: Path, adapter: Path, target: str, out: Path) -> dict[str, float]:
    os.sync()
    started = time.perf_counter()
    command = [sys.executable, "-c", RUN, "export", str(adapter), "--to", target, "--out", str(out), "--no-verify"]
    done = subprocess.run([*command, "--base", str(base)], capture_output=True, text=True, check=False)
    os.sync()
    whole = time.perf_counter() - started
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(lines[0].removeprefix("MEASURED ")) | {"whole": whole}


def copy(source: Path, to: Path) -> float:
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, to], check=True)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(to)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("20b", "120b"), default="20b", help="whose layer shapes")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--targets", nargs="+", default=["bf16", "mxfp4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--scratch", type=Path, default=Path("bench-merge"), help="made and removed; on the disk to test"
    )
    args = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, "
        f"gpt-oss-{args.size} layer shapes, rank {args.rank}, load {os.getloadavg()[0]:.1f}\n"
    )
    print("| layers | target | GB | merge MB/s | cp MB/s | merge / cp | merge CPU s | base check s | peak RSS GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    args.scratch.mkdir()
    try:
        for layers in args.layers:
            base, adapter = args.scratch / f"base-{layers}", args.scratch / f"adapter-{layers}"
            write_base(base, args.size, layers, args.vocabulary)
            checkpoint_identity(Checkpoint.open(base))  # reads it once: both runs find it in the page cache, or neither
            write_adapter(adapter, base, args.rank)
            for target in args.targets * args.repeat:
                _row(args.scratch, base, adapter, layers, target)
            shutil.rmtree(base)
            shutil.rmtree(adapter)
    finally:
        shutil.rmtree(args.scratch)


def _row(scratch: Path, base: Path, adapter: Path, layers: int, target: str) -> None:
    out = scratch / f"out-{layers}-{target}"
    found = measure(base, adapter, target, out)
    size = sum(path.stat().st_size for path in out.iterdir())
    copied = copy(out, scratch / "copy")
    shutil.rmtree(out)
    merge, plain = size / found["write"] / 1e6, size / copied / 1e6
    print(
        f"| {layers} | {target} | {size / 1e9:.2f} | {merge:.0f} | {plain:.0f} | {merge / plain:.2f} | "
        f"{found['write_cpu']:.1f} | {found['check']:.1f} | {found['peak_kib'] / 2**20:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
