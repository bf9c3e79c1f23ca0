"""Is the exported adapter the one it was made from? Asked in a fresh process, before the result gets its name."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune import log
from finetune.adapters.attach import attach_source
from finetune.adapters.read_back import (
    CHILD,
    fits_in_memory,
    run_child,
    sample_limit,
    sample_logits,
    sample_positions,
)
from finetune.adapters.store import WEIGHTS, AdapterFile
from finetune.config.schema import ModelConfig
from finetune.config.validate import load_run_config
from finetune.data.dataset import load_split
from finetune.data.harmony.render import Example
from finetune.errors import CheckError, FinetuneError
from finetune.export.gguf_file import gguf_name
from finetune.export.options import AdapterTarget, MergedTarget
from finetune.export.plan import MergePlan
from finetune.model.build import Base
from finetune.model.checkpoint import Checkpoint
from finetune.model.open import open_base
from finetune.rounding.merge import Tally

ADAPTER_CHILD = Path(__file__).with_name("adapter_child.py")


def verify_adapter(source: AdapterFile, target: AdapterTarget, directory: Path) -> dict[str, Any]:
    """Read an export back by its target's layout and compare what every site does with the source.

    Args:
        source: the adapter it was made from.
        target: whose layout it has.
        directory: where it lies, with its finetune.json.

    Returns:
        What was found, for export.json: `sites` (layers x projections x experts), `kinds` (sites by projection),
        `zeros` (projections that were added for the server and do nothing) and `max_relative_difference`.

    Raises:
        CheckError: names the tensor that is missing, unexpected, not finite or wrong.
        MachineError: the other process was killed.
    """
    request = {"target": target, "directory": str(directory), "source": str(source.directory)}
    answer = run_child(ADAPTER_CHILD, request, f"the exported adapter could not be read back as {target} has it")
    problems = answer.pop("problems")
    if problems:
        name, problem = next(iter(problems.items()))
        raise CheckError(
            f"{name} is wrong in the exported adapter: {problem}",
            why=f"{len(problems)} problems in all, {answer['sites']} sites were compared with {source.directory}",
            fix="nothing was kept; report this with the adapter's adapter_config.json",
        )
    log.info(
        f"read back as {target} has it in a fresh process: {answer['sites']} sites act as the source's "
        f"(largest relative difference {answer['max_relative_difference']:.1e})"
    )
    return answer


# Is the merged checkpoint base + adapter? Asked of others' code in fresh processes, before the result gets its name.
#
# First every weight (`weights_child.py`): keys, shapes, finite values, and each number against base + update, whatever
# the model's size. Then, where a dequantised model fits into memory, logits on prompts of the run's data
# (`adapters/read_back_child.py`).

WEIGHTS_CHILD = Path(__file__).with_name("weights_child.py")
NUM_SAMPLES = 4
MAX_MEAN_KL = 1e-2  # bfloat16 rounds every merged weight, and a token near a tie then takes another expert
MAX_KL_SHARE = 0.05  # of the KL between plain base and adapter; measured 0.0007


def verify_merged(
    plan: MergePlan, target: MergedTarget, directory: Path, run: Path | None, tallies: Mapping[str, Tally]
) -> dict[str, Any]:
    """Check a merged checkpoint.

    Args:
        plan: what was written.
        target: `gguf` has its file compared weight by weight; its logits need llama.cpp.
        directory: where it lies, complete.
        run: whose data give the prompts; None: logits are not compared.
        tallies: what the exporter counted.

    Returns:
        What was found, for export.json.

    Raises:
        CheckError: names the tensor that is wrong, or says how far logits are apart.
    """
    result: dict[str, Any] = {"weights": _check_weights(plan, target, directory, tallies)}
    samples, reason = _prompts(run)
    if target == "gguf":
        reason = "the file's own runtime is llama.cpp; its weights were compared"
    if samples and reason is None:
        return result | {"logits": compare_logits(plan, directory, samples)}
    log.info(f"logits were not compared: {reason}")
    return result | {"logits": {"skipped": reason}}


def compare_weights(
    plan: MergePlan, target: MergedTarget, directory: Path, tallies: Mapping[str, Tally]
) -> dict[str, Any]:
    """Ask the fresh process about every weight; its answer (`problems` by tensor, `compared`, `updates`)."""
    biases = plan.source.router_bias
    request = {
        "base": str(plan.checkpoint.directory),
        "adapter": str(plan.source.directory / WEIGHTS),
        "merged": str(directory / gguf_name(plan) if target == "gguf" else directory),
        "experts": plan.target,
        "biases": {name: change.tolist() for name, change in biases.items()},
        "rounding": plan.rounding,
        "moved": [operation.name for operation in plan.operations if operation.kind == "expert bias"],
        "sums": {
            name: {"kept": tally.kept, "missed": tally.missed, "checksum": tally.checksum}
            for name, tally in tallies.items()
        },
        "updates": {name: tally.wanted**0.5 for name, tally in tallies.items()}
        | {name: float(change.norm()) for name, change in biases.items()},
        "sites": [
            {"module": site.module, "a": site.key_a, "b": site.key_b, "rank": site.rank, "scale": site.scale}
            for site in plan.source.sites
        ],
    }
    return run_child(WEIGHTS_CHILD, request, f"{directory} could not be read back")


def _check_weights(
    plan: MergePlan, target: MergedTarget, directory: Path, tallies: Mapping[str, Tally]
) -> dict[str, Any]:
    log.info("comparing every weight with base + update in a fresh process ...")
    answer = compare_weights(plan, target, directory, tallies)
    if answer["problems"]:
        name, problem = next(iter(answer["problems"].items()))
        raise CheckError(
            f"{name} is wrong in the merged checkpoint: {problem}",
            why=f"{len(answer['problems'])} tensors are wrong, {answer['compared']} comparisons were made",
        )
    changed = len(answer["updates"])
    rule = "to the last bit of bfloat16"
    if plan.target == "mxfp4":
        nearest = "no block further from it than the base"
        rule = nearest if plan.rounding == "nearest" else f"{plan.rounding} rounding, what survives as it was counted"
    log.info(f"weights: {changed} changed tensors are base + update ({rule}), all others are the base's")
    return {"tensors_changed": changed, "comparisons": answer["compared"], "updates": answer["updates"]}


def _prompts(run: Path | None) -> tuple[list[Example], str | None]:
    """Samples of the run's data, and why there are none."""
    if run is None:
        return [], "the adapter belongs to no run, so there are no prompts"
    try:
        config = load_run_config(run / "config.yaml")
        split = load_split(config.data, "test" if config.data.test else "train")
    except FinetuneError as error:
        log.warning(f"the run's data cannot be read: {error.what}")
        return [], f"the run's data cannot be read: {error.what}"
    return list(split.examples[:NUM_SAMPLES]), None


def _open_reference(checkpoint: Checkpoint) -> Base:
    """Open a checkpoint with the reference kernels, on the GPU if there is one."""
    settings = ModelConfig(
        path=str(checkpoint.directory), expert_kernel="reference", attention_kernel="reference", experts_per_chunk=4
    )
    return open_base(settings, checkpoint=checkpoint, verify_files=False, quiet=True)


def compare_logits(plan: MergePlan, directory: Path, samples: Sequence[Example]) -> dict[str, Any]:
    """Compare transformers' logits of the merged directory with those of the live base + adapter.

    Returns:
        Largest difference, mean KL and share of equal likeliest tokens against the live base + adapter (`adapted`),
        the plain `base`, and for MXFP4 what our own reader makes of the files (`merged`); or why it was `skipped`.

    Raises:
        CheckError: the directory does not load cleanly, or is another model.
    """
    base = _open_reference(plan.checkpoint)
    dtype = base.compute_dtype
    if not fits_in_memory(base):
        reason = "a dequantised model needs more than half of the memory that is free"
        log.warning(f"logits were not compared: {reason}")
        return {"skipped": reason}
    tensors = sample_positions(samples)
    tensors |= sample_logits(base, tensors, "base")
    attach_source(base, plan.source)
    tensors |= sample_logits(base, tensors, "adapted")
    if plan.target == "mxfp4":  # what was written, by our own reader: rounding may have lost the adapter
        merged = _open_reference(Checkpoint.open(directory))
        tensors |= sample_logits(merged, tensors, "merged")
        tensors |= sample_limit(merged, tensors, "merged")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "live.safetensors"
        save_file(tensors, path)
        request = {"base": str(directory), "tensors": str(path), "dtype": str(dtype).removeprefix("torch.")}
        answer = run_child(CHILD, request, f"transformers could not load {directory}")
    limit = tensors["limit.merged"].item() if "limit.merged" in tensors else None
    _judge(answer, directory, limit, exact=dtype == torch.float32)
    adapted, plain = answer["adapted"], answer["base"]
    log.info(
        f"logits by transformers in a fresh process against base + adapter on {len(samples)} samples: "
        f"KL {adapted['mean_kl']:.1e}, same likeliest token {adapted['argmax_agreement']:.1%}, largest difference "
        f"{adapted['max_difference']:.2g} (the plain base: KL {plain['mean_kl']:.1e})"
    )
    facts = {"samples": len(samples), "dtype": request["dtype"]}
    return facts | ({} if limit is None else {"limit": limit}) | answer


def _judge(answer: Mapping[str, Any], directory: Path, limit: float | None, *, exact: bool) -> None:
    """`limit`: what rounding explains of the difference between two readers of what was written (MXFP4)."""
    if answer["problems"]:
        raise CheckError(f"{directory} did not load cleanly with transformers: {answer['problems']}")
    if limit is None:
        worst, limit = answer["adapted"]["mean_kl"], max(MAX_MEAN_KL, answer["base"]["mean_kl"] * MAX_KL_SHARE)
        measure = "KL"
    else:  # MXFP4: is it what we wrote? How near that is to the adapter is reported, not judged.
        worst = answer["merged"]["max_difference" if exact else "mean_kl"]
        measure = "largest difference" if exact else "KL"
    if not worst <= limit:
        raise CheckError(
            f"{directory} is not the model that was merged: logits of model.layers.0 to lm_head differ, "
            f"{measure} {worst:.2g} where {limit:.2g} is allowed",
            why="every weight agrees with base + update, so what differs is how the directory is read: config.json",
        )
