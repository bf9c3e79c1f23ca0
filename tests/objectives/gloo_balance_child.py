"""One of two gloo ranks: compute a step of its own micro-batches and save the averaged gradients."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from router_runs import Run, samples
from safetensors.torch import save_file

from finetune.data.batches import collate, padding_batch


def main(base: str, out: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.distributed_type
    data = samples(5)
    settings = {"router_balance_coefficient": 5.0, "router_balance_scope": "step", "router_balance_target": "base"}
    run = Run(Path(base), accelerator=accelerator, router_z_loss_coefficient=0.1, **settings)
    shares = [[collate([[sample]]) for sample in data[:3]], [collate([data[3:]]), padding_batch(), padding_batch()]]
    stats = run(shares[accelerator.process_index])
    gradients = {name: accelerator.reduce(gradient, "mean") for name, gradient in run.gradients.items()}
    if accelerator.is_main_process:
        save_file(gradients, out)
        Path(out).with_suffix(".json").write_text(json.dumps(stats.terms))


if __name__ == "__main__":
    main(*sys.argv[1:])
