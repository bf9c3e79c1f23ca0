"""The last question of a merge to MXFP4: did the fine-tune survive? Asked of held-out rows, where memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune import log
from finetune.config.schema import ModelConfig, RunConfig
from finetune.errors import FinetuneError
from finetune.export.effect import held_out_rows, measure_variants, print_effect
from finetune.export.judge import judge
from finetune.export.options import ExportOptions
from finetune.export.plan import MergePlan
from finetune.export.variants import Variants
from finetune.machine import free_memory
from finetune.model.open import choose_device, open_base
from finetune.rounding.calibration import calibration_config
from finetune.rounding.run import RoundedExperts

_EXPERTS_PER_CHUNK = 4
_MEMORY_SHARE = 0.8  # of what is free, for the packed base and activations


def measure_survival(
    plan: MergePlan, rounded: RoundedExperts | None, options: ExportOptions, run: Path | None
) -> dict[str, Any]:
    """Measure every way of serving the adapter, and judge the one that was written.

    Args:
        plan: a native plan with rounded experts.
        rounded: of compensated rounding.
        options: name the rows where the adapter has no run.
        run: of the adapter.

    Returns:
        Figures (see `measure_variants`) with a `verdict`, or why it was `skipped`.
    """
    config, reason = _config(options, run)
    if config is not None and config.export.survival_examples == 0:
        reason = "export.survival_examples is 0"
    if config is None or reason is not None:
        return _skipped(str(reason))
    rows = held_out_rows(config, config.export.survival_examples)
    if rows is None:
        return _skipped("the recipe names neither test nor validation rows")
    settings = ModelConfig(
        path=str(plan.checkpoint.directory),
        expert_kernel="reference",
        attention_kernel="reference",
        experts_per_chunk=_EXPERTS_PER_CHUNK,
    )
    device = choose_device(settings)
    if not _fits(plan, device):
        return _skipped("the packed base does not fit into the memory that is free")
    base = open_base(settings, checkpoint=plan.checkpoint, verify_files=False, quiet=True)
    facts = measure_variants(Variants(base, plan, rounded), rows)
    print_effect(facts)
    verdict = judge(facts, plan.rounding, config.export)
    for note in verdict["notes"]:
        log.result(note)
    return facts | {"verdict": verdict}


def _config(options: ExportOptions, run: Path | None) -> tuple[RunConfig | None, str | None]:
    if run is None and options.calibration is None:
        return None, "the adapter belongs to no run, so there are no held-out rows"
    try:
        return calibration_config(options.calibration, run), None
    except FinetuneError as error:
        return None, f"the run's configuration cannot be read: {error.what}"


def _fits(plan: MergePlan, device: torch.device) -> bool:
    return plan.checkpoint.num_bytes < free_memory(device) * _MEMORY_SHARE


def _skipped(reason: str) -> dict[str, Any]:
    log.warning(f"whether the fine-tune survives was not measured: {reason}")
    return {"skipped": reason}
