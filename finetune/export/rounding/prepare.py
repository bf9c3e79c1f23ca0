"""From what the command line asks for to rounded experts: which rounding, which rows, on which device."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

from finetune import log
from finetune.config.schema import ModelConfig
from finetune.errors import ConfigError
from finetune.export.plan import MergePlan
from finetune.export.rounding.calibration import calibration_config, check_belongs, choose_rows
from finetune.export.rounding.compensate import Settings
from finetune.export.rounding.run import RoundedExperts, round_experts_by_layer, rounding_staging
from finetune.export.source import EXPERTS, AdapterSource
from finetune.export.targets import DEFAULT_ROUNDING, ExportOptions, MergedTarget, Rounding
from finetune.model.build import choose_device, choose_dtype


def choose_rounding(layout: MergedTarget, source: AdapterSource, options: ExportOptions) -> Rounding:
    """The rounding of an export; `nearest`, which then means nothing, where no expert is rounded.

    Args:
        layout: how experts are stored: `bf16` or `mxfp4`.
        source: the adapter.
        options: what the command line asked for.

    Raises:
        ConfigError: it asks for a rounding or a calibration that would do nothing.
    """
    rounds = layout == "mxfp4" and any(site.name in EXPERTS for site in source.sites)
    rounding = options.rounding or (DEFAULT_ROUNDING if rounds else "nearest")
    if options.rounding and not rounds:
        why = "experts stay in bfloat16" if layout != "mxfp4" else "the adapter changes no expert"
        raise ConfigError(f"--rounding {options.rounding} does nothing here: {why}", fix="leave it out")
    if options.calibration and rounding != "compensated":
        raise ConfigError(
            "--calibration is for compensated rounding alone", fix="leave it out, or ask for --rounding compensated"
        )
    return rounding


def round_ahead(
    plan: MergePlan, out: Path, options: ExportOptions, run: Path | None, identity: str, key: str
) -> RoundedExperts | None:
    """Round the experts before anything is written, where they are compensated.

    Args:
        plan: what to merge.
        out: the export's directory; the rounded layers lie beside it until it is done.
        options: what the command line asked for.
        run: the adapter's run, if it belongs to one.
        identity: of the base.
        key: of the export.

    Returns:
        The rounded experts; None for other roundings, which are done while writing.

    Raises:
        ConfigError: there are no rows to calibrate on.
        InputError: they are of another base, tokenizer or training set.
        CheckError: an expert's inputs are not finite.
    """
    if plan.rounding != "compensated":
        return None
    config = calibration_config(options.calibration, run)
    calibration, data = choose_rows(config, plan.checkpoint, config.export.calibration_tokens)
    check_belongs(options.calibration, run, identity, data)
    settings = Settings()
    where = ModelConfig(path=str(plan.checkpoint.directory))
    device = choose_device(where)
    text = "\n".join([key, calibration.fingerprint, str(asdict(settings)), device.type])
    staging = rounding_staging(out, hashlib.sha256(text.encode()).hexdigest())
    rounded = round_experts_by_layer(plan, calibration, staging, device, choose_dtype(where, device), settings)
    for line in describe_experts(rounded):
        log.info(line)
    return rounded


def describe_experts(rounded: RoundedExperts) -> list[str]:
    """What became of experts that were not rounded as a matter of course, by name."""
    lines = []
    for name, reports in rounded.experts.items():
        kinds: dict[str, list[int]] = {}
        for report in reports:
            if report["state"] != "rounded":
                kinds.setdefault(report["state"], []).append(report["expert"])
            elif report["singular"]:
                kinds.setdefault("rounded with more damping: singular moments", []).append(report["expert"])
            elif report["borrowed"]:
                kinds.setdefault("rounded with moments shrunk to the layer's: few rows", []).append(report["expert"])
        lines += [f"{name}: {kind}: experts {', '.join(map(str, numbers))}" for kind, numbers in kinds.items()]
    return lines
