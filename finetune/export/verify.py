"""Verification of exports in fresh processes that import nothing of ours, before a result gets its name.

An adapter is read back by its target's layout (`children/adapter.py`). A merged checkpoint has every weight compared
with base + update (`children/weights.py`), and, where a dequantised model fits into memory, its logits on prompts of
the run's data (`adapters/read_back_child.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from finetune import log
from finetune.adapters.attach import attach_for_merge
from finetune.adapters.read_back import (
    CHILD,
    fits_in_memory,
    run_child,
    sample_limit,
    sample_logits,
    sample_positions,
)
from finetune.adapters.store import WEIGHTS, AdapterFile
from finetune.config.validate import load_run_config
from finetune.data.dataset import load_split
from finetune.data.harmony.render import Example
from finetune.errors import CheckError, FinetuneError
from finetune.export.base import open_reference
from finetune.export.options import AdapterTarget, MergedTarget
from finetune.export.plan import MergePlan
from finetune.export.record import AdapterCheck, LogitsCheck, LogitsDistance, MergeCheck, Skipped, WeightsCheck
from finetune.export.targets.gguf import gguf_name
from finetune.model.checkpoint import Checkpoint
from finetune.rounding.merge import Tally

CHILDREN = Path(__file__).with_name("children")
NUM_EXAMPLES = 4
NOISE_FACTOR = 2  # a token near a tie takes another expert or not: two perturbed runs may miss the worst case


@dataclass(frozen=True)
class WeightsAnswer:
    """The result of `children/weights.py`: problems by tensor, number of comparisons, norms of updates by tensor."""

    problems: dict[str, str]
    compared: int
    updates: dict[str, dict[str, float]]


def verify_adapter(adapter: AdapterFile, target: AdapterTarget, directory: Path) -> AdapterCheck:
    """Read an exported adapter back by its target's layout and compare what every site computes with the source.

    Args:
        adapter: the one it was made from.
        target: of the export.
        directory: of the export, with its finetune.json.

    Raises:
        CheckError: names the tensor that is missing, unexpected, not finite or wrong.
        MachineError: the other process was killed.
    """
    request = {"target": target, "directory": str(directory), "source": str(adapter.directory)}
    failure = f"the exported adapter could not be read back in the layout of {target}"
    answer = run_child(CHILDREN / "adapter.py", request, failure)
    problems = answer.pop("problems")
    check = AdapterCheck(**answer)
    if problems:
        name, problem = next(iter(problems.items()))
        raise CheckError(
            f"{name} is wrong in the exported adapter: {problem}",
            why=f"{len(problems)} problems in all, {check.sites} sites were compared with {adapter.directory}",
            fix="nothing was kept; report this with the adapter's adapter_config.json",
        )
    log.info(
        f"read back in the layout of {target} in a fresh process: {check.sites} sites act as the source's "
        f"(largest relative difference {check.max_relative_difference:.1e})"
    )
    return check


def verify_merged(
    plan: MergePlan,
    target: MergedTarget,
    directory: Path,
    run: Path | None,
    tallies: Mapping[str, Tally],
    template: str | None = None,
) -> MergeCheck:
    """Check a merged checkpoint.

    Args:
        plan: what was written.
        target: `gguf` has its file compared weight by weight; its logits need llama.cpp.
        directory: of the export, complete.
        run: whose data give the prompts; None: logits are not compared.
        tallies: sums that the exporter counted.
        template: the chat template it must have; None: not checked.

    Raises:
        CheckError: names the tensor that is wrong, or gives the distance of the logits.
    """
    weights = _check_weights(plan, target, directory, tallies, template)
    examples, reason = _prompts(run)
    if target == "gguf":
        reason = "the file's own runtime is llama.cpp; its weights were compared"
    if examples and reason is None:
        return MergeCheck(weights, compare_logits(plan, directory, examples))
    log.info(f"logits were not compared: {reason}")
    return MergeCheck(weights, Skipped(str(reason)))


def compare_weights(
    plan: MergePlan,
    target: MergedTarget,
    directory: Path,
    tallies: Mapping[str, Tally],
    template: str | None = None,
) -> WeightsAnswer:
    """Compare every weight, and every value of configuration and tokenizer, in a fresh process."""
    biases = plan.adapter.router_bias
    request = {
        "base": str(plan.checkpoint.directory),
        "adapter": str(plan.adapter.directory / WEIGHTS),
        "merged": str(directory / gguf_name(plan) if target == "gguf" else directory),
        "experts": plan.target,
        "template": template,
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
            for site in plan.adapter.sites
        ],
    }
    return WeightsAnswer(**run_child(CHILDREN / "weights.py", request, f"{directory} could not be read back"))


def _check_weights(
    plan: MergePlan, target: MergedTarget, directory: Path, tallies: Mapping[str, Tally], template: str | None
) -> WeightsCheck:
    log.info("comparing every weight with base + update in a fresh process ...")
    answer = compare_weights(plan, target, directory, tallies, template)
    if answer.problems:
        name, problem = next(iter(answer.problems.items()))
        raise CheckError(
            f"{name} is wrong in the merged checkpoint: {problem}",
            why=f"{len(answer.problems)} tensors or settings are wrong, {answer.compared} comparisons were made",
        )
    check = WeightsCheck(len(answer.updates), answer.compared, answer.updates)
    rule = "to the last bit of bfloat16"
    if plan.target == "mxfp4":
        nearest = "no block further from it than the base"
        rule = nearest if plan.rounding == "nearest" else f"{plan.rounding} rounding, what survives as it was counted"
    log.info(f"weights: {check.tensors_changed} changed tensors are base + update ({rule}), all others are the base's")
    return check


def _prompts(run: Path | None) -> tuple[list[Example], str | None]:
    """Examples of the run's data, and why there are none."""
    if run is None:
        return [], "the adapter belongs to no run, so there are no prompts"
    try:
        config = load_run_config(run / "config.yaml")
        split = load_split(config.data, "test" if config.data.test else "train")
    except FinetuneError as error:
        log.warning(f"the run's data cannot be read: {error.what}")
        return [], f"the run's data cannot be read: {error.what}"
    return list(split.examples[:NUM_EXAMPLES]), None


def compare_logits(plan: MergePlan, directory: Path, examples: Sequence[Example]) -> LogitsCheck | Skipped:
    """Compare transformers' logits of the merged directory with those of the live base + adapter.

    Raises:
        CheckError: the directory does not load cleanly, or is another model.
    """
    base = open_reference(plan.checkpoint)
    dtype = base.compute_dtype
    if not fits_in_memory(base):
        reason = "a dequantised model needs more than half of the memory that is free"
        log.warning(f"logits were not compared: {reason}")
        return Skipped(reason)
    tensors = sample_positions(examples)
    tensors |= sample_logits(base, tensors, "base")
    attach_for_merge(base, plan.adapter)
    tensors |= sample_logits(base, tensors, "adapted")
    if plan.target == "bf16":
        tensors |= sample_limit(base, tensors, "adapted", rounded_weights=True)
    if plan.target == "mxfp4":  # what was written, by our own reader: rounding may have lost the adapter
        merged = open_reference(Checkpoint.open(directory))
        tensors |= sample_logits(merged, tensors, "merged")
        tensors |= sample_limit(merged, tensors, "merged")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "live.safetensors"
        save_file(tensors, path)
        request = {"base": str(directory), "tensors": str(path), "dtype": str(dtype).removeprefix("torch.")}
        answer = run_child(CHILD, request, f"transformers could not load {directory}")
    if answer["problems"]:
        raise CheckError(f"{directory} did not load cleanly with transformers: {answer['problems']}")
    distances = {name: LogitsDistance(**answer[name]) for name in ("adapted", "base", "merged") if name in answer}
    limit = tensors["limit.merged" if "limit.merged" in tensors else "limit.adapted"].item()
    check = LogitsCheck(len(examples), request["dtype"], limit, {}, **distances)
    _judge_logits(check, directory)
    found = check.adapted
    log.info(
        f"logits by transformers in a fresh process against base + adapter on {check.samples} samples: KL "
        f"{found.mean_kl:.1e}, same likeliest token {found.argmax_agreement:.1%}, largest difference "
        f"{found.max_difference:.2g} (the plain base: KL {check.base.mean_kl:.1e})"
    )
    return check


def _judge_logits(check: LogitsCheck, directory: Path) -> None:
    measure = "KL"
    assert check.limit is not None
    limit = check.limit
    if check.merged is None:  # bfloat16: rounding the weights is all that may differ
        worst, limit = check.adapted.mean_kl, NOISE_FACTOR * check.limit
    else:  # MXFP4: is it what we wrote? How near that is to the adapter is reported, not judged.
        exact = check.dtype == "float32"
        worst = check.merged.max_difference if exact else check.merged.mean_kl
        measure = "largest difference" if exact else "KL"
    if not worst <= limit:
        raise CheckError(
            f"{directory} is not the model that was merged: logits of model.layers.0 to lm_head differ, "
            f"{measure} {worst:.2g} where {limit:.2g} is allowed",
            why="every weight agrees with base + update, so what differs is how the directory is read: config.json",
        )
