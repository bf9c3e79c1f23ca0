"""Cost of a whole training step beside the usual ways: `python bench/step.py --help`.

Every variant makes the same step: the same random base, batch, attention, loss head, balance loss, clipping and AdamW.
They differ in the adapted sites and in the implementation of the experts:

  ours            LoRA on attention and on every expert, over packed MXFP4
  ours, attention LoRA on attention alone, over packed MXFP4
  PEFT            `target_parameters` on every expert and LoRA on attention, over transformers' dequantised model
  PEFT, attention LoRA on attention alone, over transformers' dequantised model

The first loss is printed for each: B is zero at the start, so all must agree. Weights are made on the device.
On a GPU `--cap-gb 84` lets context and allocator together have 84.0e9 bytes, which is what an 80 GB card has.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import yaml
from measure import interleaved, machine, peak_bytes, publish, summary
from random_base import SHAPES, config_of, dense_bytes, dequantised, random_base
from torch import nn

from finetune import log
from finetune.adapters.attach import attach_adapter
from finetune.arch import Arch
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig, TrainerConfig
from finetune.data.batches import Batch
from finetune.model.attention import select_attention_kernel
from finetune.model.build import Base
from finetune.model.experts import select_expert_kernel
from finetune.model.forward import checkpoint_activations
from finetune.train.engines.base import single_engine
from finetune.train.optim import make_optimizer
from finetune.train.step import OptimiserStep

VARIANTS = ("ours", "ours, attention", "PEFT", "PEFT, attention")


@dataclass
class Variant:
    """A step that can be made again and again.

    Attributes:
        step: makes it and returns its loss.
        parameters: trained ones.
        loss: of the first step.
    """

    step: Callable[[], float]
    parameters: int
    loss: float | None = None

    def __call__(self) -> None:
        loss = self.step()
        self.loss = loss if self.loss is None else self.loss


def make_variant(name: str, config: dict[str, Any], batch: Batch, args: argparse.Namespace) -> Variant:
    """Build a base of its own, attach an adapter and wrap one optimiser step."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = random_base(config, device, dtype, args.experts_per_chunk, embedding_on_cpu=args.embedding_on_cpu)
    expert_rank = 0 if name.endswith("attention") else args.rank
    if name.startswith("ours"):
        adapter = AdapterConfig(
            attention=AttentionAdapterConfig(rank=args.rank, alpha=2.0 * args.rank),
            experts=ExpertAdapterConfig(rank=expert_rank, alpha=2.0 * args.rank),
            dtype=args.adapter_dtype,
        )
        parameters = dict(attach_adapter(base, adapter, seed=0).parameters())
    else:
        base = dequantised(base)
        parameters = _peft_parameters(base, args.rank, experts=bool(expert_rank))
    log.info(select_attention_kernel(base.model, args.attention_kernel).describe())
    if name.startswith("ours"):
        log.info(select_expert_kernel(base.model, "auto").describe())
    trainer = replace(TrainerConfig(), **{key: yaml.safe_load(value) for key, _, value in _pairs(args.trainer)})
    if trainer.activation_checkpointing:
        checkpoint_activations(base.model)
    step = OptimiserStep(trainer, base, single_engine(parameters, make_optimizer(parameters, trainer), trainer))
    return Variant(lambda: step([batch], 1e-4, 1).loss, sum(parameter.numel() for parameter in parameters.values()))


def _pairs(overrides: list[str]) -> list[tuple[str, str, str]]:
    return [override.partition("=") for override in overrides]


def _peft_parameters(dense: Base, rank: int, *, experts: bool) -> dict[str, nn.Parameter]:
    from peft import LoraConfig, get_peft_model

    projections = ["gate_up_proj", "down_proj"] if experts else []
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=[f"mlp.experts.{name}" for name in projections] or None,
    )
    model = get_peft_model(dense.model, config)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch_of(args: argparse.Namespace, vocabulary: int) -> Batch:
    """`rows` sequences of `length` random tokens, in examples of `segment`; a share of each is trained."""
    shape = (args.rows, args.length)
    index = torch.arange(args.length).expand(shape)
    segment = args.segment or args.length
    ids = torch.randint(2, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    positions = index % segment
    weights = (positions >= max(1, segment * (1 - args.trained_share))).float()
    return Batch(ids, weights, positions, index // segment, tuple(("random",) for _ in range(args.rows)))


def cap_memory(cap_gb: float, device: torch.device) -> dict[str, float]:
    """Let context plus allocator have `cap_gb` x 1e9 bytes, and log both parts."""
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    allocator = cap_gb * 1e9 - context
    torch.cuda.set_per_process_memory_fraction(min(1.0, allocator / total), device)
    return {"context_gb": round(context / 1e9, 3), "allocator_cap_gb": round(allocator / 1e9, 3)}


def measure(variants: dict[str, Variant], args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time the variants in turn; memory of each apart."""
    seconds = interleaved({name: variant.__call__ for name, variant in variants.items()}, args.repeats, device)
    tokens, rows = args.rows * args.length, []
    for name, variant in variants.items():
        row = {
            "step": name,
            "trained parameters": variant.parameters,
            "first loss": round(variant.loss or 0.0, 5),
            **summary(seconds[name]),
            "tokens/s": round(tokens / median(seconds[name]), 1),
            "step memory GB": round(peak_bytes(variant, device) / 1e9, 3),
        }
        if device.type == "cuda":
            row["allocated GB"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
            row["reserved GB"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 3)
        rows.append(row)
    return rows


def measure_alone(name: str, config: dict[str, Any], batch: Batch, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One variant with the GPU to itself; a variant that does not fit is marked in its line."""
    device = torch.device(args.device)
    try:
        return measure({name: make_variant(name, config, batch, args)}, args, device)
    except torch.OutOfMemoryError as error:
        dense_gb = dense_bytes(Arch.from_config(config, "config.json")) / 1e9
        held = f"; dequantised experts are {dense_gb:.1f} GB" if name.startswith("PEFT") else ""
        return [{"step": name, "note": f"does not fit: {str(error).splitlines()[0]}{held}"}]
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def compare(rows: list[dict[str, Any]]) -> None:
    """Add what every step costs against both steps that adapt attention alone."""
    medians = {row["step"]: row.get("median_ms") for row in rows}
    for column, other in (("/ ours, attention", "ours, attention"), ("/ PEFT, attention", "PEFT, attention")):
        for row in rows:
            if medians.get(other) and row.get("median_ms"):
                row[column] = round(row["median_ms"] / medians[other], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument(
        "--segment", type=int, help="tokens of an example in the sequence; default: the sequence is one example"
    )
    parser.add_argument("--trained-share", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--experts-per-chunk", type=int, default=16)
    parser.add_argument("--attention-kernel", choices=["auto", "flash", "reference"], default="auto")
    parser.add_argument("--adapter-dtype", choices=["float32", "bfloat16"], default="float32", help="of ours")
    parser.add_argument("--embedding-on-cpu", action="store_true", help="model.embedding_on_cpu; of ours")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--trainer", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe's trainer")
    parser.add_argument("--cap-gb", type=float, help="GPU: 1e9 bytes for context and allocator together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write bench/results/DATE-NAME.{json,md}")
    args = parser.parse_args()
    device = torch.device(args.device)
    facts, config = machine(device), config_of(args.shape)
    if args.cap_gb:
        facts |= cap_memory(args.cap_gb, device)
        log.info(f"context {facts['context_gb']} GB, allocator at most {facts['allocator_cap_gb']} GB")
    batch = batch_of(args, config["vocab_size"])
    if device.type == "cuda":
        rows = [row for name in args.variants for row in measure_alone(name, config, batch, args)]
    else:
        rows = measure({name: make_variant(name, config, batch, args) for name in args.variants}, args, device)
    compare(rows)
    note = (
        f"{args.shape} shape, random weights; {args.rows} x {args.length:,} tokens, {args.trained_share:.0%} trained, "
        f"rank {args.rank} in {args.adapter_dtype}, trainer {' '.join(args.trainer) or 'defaults'}; "
        f"median of {args.repeats}."
    )
    if device.type == "cpu":
        note += " Step memory is what resident memory grew by beyond what earlier steps left."
    publish(args.save or "step", "Training step", facts, rows, save=bool(args.save), note=note)


if __name__ == "__main__":
    main()
