"""Survival of the fine-tune end to end: every way of serving an adapter measured on the same held-out examples.

Sums over weights say little: a change of the same size in another direction is noise. Here each variant's loss, label
accuracy and KL to base + adapter are measured on held-out examples, its loss on examples of the old domain, and the
variant that was written is compared with the recipe's thresholds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune import log
from finetune.config.schema import ExportConfig, RunConfig
from finetune.data.dataset import load_split
from finetune.data.harmony.render import Example
from finetune.data.sources import Record
from finetune.errors import CheckError, FinetuneError
from finetune.evaluate.evalset import label_set, stratified_subset
from finetune.evaluate.labels import score_labels
from finetune.evaluate.likelihood import HeldOutLoss, held_out_loss, predicted_states
from finetune.evaluate.statistics import bootstrap_ratio_interval
from finetune.export.base import open_reference, reference_settings
from finetune.export.options import ExportOptions, Rounding
from finetune.export.plan import MergePlan
from finetune.export.record import NULL, Skipped
from finetune.export.survival.variants import NAMES, Variants
from finetune.kernels.loss_head import token_kl, token_nll
from finetune.machine import free_memory
from finetune.model.open import choose_device
from finetune.rounding.calibration import calibration_config
from finetune.rounding.results import RoundedExperts

NUM_RESAMPLES = 1000
_MEMORY_SHARE = 0.8  # of what is free, for the packed base and activations


@dataclass(frozen=True)
class VariantFigures:
    """One way of serving an adapter.

    Attributes:
        loss: nats per trained token.
        kl: mean KL(base + adapter || variant).
        accuracy: of labels, where they are scored.
        old_domain_loss: where there are such examples.
        gain_kept: share of the adapter's gain, with interval; None where the adapter gains nothing.
        kl_removed: 1 - kl / the base's.
    """

    loss: float
    kl: float
    accuracy: float | None
    old_domain_loss: float | None
    gain_kept: float | None = field(metadata=NULL)
    gain_kept_interval: tuple[float, float] | None = field(metadata=NULL)
    kl_removed: float


@dataclass(frozen=True)
class Verdict:
    """Whether the written variant keeps the fine-tune.

    Attributes:
        kept: it passed.
        reasons: why not.
        notes: on what could not be judged.
    """

    kept: bool
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Effect:
    """All variants on the same examples.

    Attributes:
        rows: examples of the domain.
        split: they are from.
        old_domain_rows: examples of the old domain.
        confidence: of intervals.
        gain: of the adapter, nats per trained token, with interval.
        variants: by name, `base` and `adapter` among them.
        verdict: on the variant that was written; None: not compared with thresholds.
    """

    rows: int
    split: str
    old_domain_rows: int
    confidence: float
    gain: float
    gain_interval: tuple[float, float]
    variants: dict[str, VariantFigures]
    verdict: Verdict | None = None


@dataclass(frozen=True)
class HeldOutExamples:
    """Examples that neither calibration nor training saw.

    Attributes:
        split: they are from: `test` or `validation`.
        records, examples: one record for each example.
        labels: candidate answers, or None where labels are not scored.
        old_domain: examples of other domains, empty if the recipe names none.
        config: of the run.
    """

    split: str
    records: tuple[Record, ...]
    examples: tuple[Example, ...]
    labels: tuple[str, ...] | None
    old_domain: tuple[Example, ...]
    config: RunConfig


def measure_survival(
    plan: MergePlan, rounded: RoundedExperts | None, options: ExportOptions, run: Path | None
) -> Effect | Skipped:
    """Measure every way of serving the adapter, and compare the written one with the recipe's thresholds.

    Args:
        plan: a native plan with rounded experts.
        rounded: of compensated rounding.
        options: name the data where the adapter has no run.
        run: of the adapter.
    """
    if run is None and options.calibration is None:
        return _skipped("the adapter belongs to no run, so there are no held-out examples")
    try:
        config = calibration_config(options.calibration, run)
    except FinetuneError as error:
        return _skipped(f"the run's configuration cannot be read: {error.what}")
    if config.export.survival_examples == 0:
        return _skipped("export.survival_examples is 0")
    held_out = held_out_examples(config, config.export.survival_examples)
    if held_out is None:
        return _skipped("the recipe names neither test nor validation records")
    if not fits_in_memory(plan, choose_device(reference_settings(plan.checkpoint))):
        return _skipped("the packed base does not fit into the memory that is free")
    what = "losses and labels" if held_out.labels is not None else "losses"
    log.info(
        f"measuring what survives: {what} of {len(held_out.examples)} held-out examples with every variant of the "
        "model; export.survival_examples takes fewer, 0 skips it"
    )
    base = open_reference(plan.checkpoint)
    effect = measure_variants(Variants(base, plan, rounded), held_out)
    verdict = compare_with_thresholds(effect, plan.rounding, config.export)
    for line in [*describe_effect(effect), *verdict.notes]:
        log.result(line)
    return replace(effect, verdict=verdict)


def fits_in_memory(plan: MergePlan, device: torch.device) -> bool:
    """Whether the packed base fits into the device's free memory with room for activations."""
    return plan.checkpoint.num_bytes < free_memory(device) * _MEMORY_SHARE


def _skipped(reason: str) -> Skipped:
    log.warning(f"whether the fine-tune survives was not measured: {reason}")
    return Skipped(reason)


def held_out_examples(config: RunConfig, count: int) -> HeldOutExamples | None:
    """The examples a merge is measured on, stratified by answer; None if the recipe has no test or validation data.

    Args:
        config: of the run.
        count: examples at most, of the domain and of the old one.

    Raises:
        InputError: the data cannot be read.
    """
    data = config.data
    if not (data.test or data.validation or data.validation_split.key):
        return None
    name = "test" if data.test else "validation"
    split = load_split(data, name)  # type: ignore[arg-type]
    chosen = stratified_subset(split.records, count)
    records = tuple(split.records[number] for number in chosen)
    labels = label_set(split.records) if config.export.survival_labels else None
    old: tuple[Example, ...] = ()
    if config.export.old_domain:
        other = load_split(replace(data, test=config.export.old_domain), "test")
        old = tuple(other.examples[number] for number in stratified_subset(other.records, count))
    return HeldOutExamples(name, records, tuple(split.examples[number] for number in chosen), labels, old, config)


def measure_variants(variants: Variants, held_out: HeldOutExamples, names: Sequence[str] | None = None) -> Effect:
    """Measure each variant.

    Args:
        variants: of a live model.
        held_out: examples to measure on.
        names: of variants; None: all that can be made. `base` and `adapter` are always among them.
    """
    wanted = [name for name in variants.names() if names is None or name in (*names, "base", "adapter")]
    model, data = variants.base.model, held_out.config.data
    head, examples, length = model.lm_head.weight, held_out.examples, data.max_length
    variants.become("adapter")
    started = time.monotonic()
    reference = [found.hidden for found in predicted_states(model, examples, length, "adapter", _nothing)]
    if held_out.labels is None:
        log.info(f"about {log.duration((time.monotonic() - started) * len(wanted))} for {len(wanted)} variants")
    losses: dict[str, HeldOutLoss] = {}
    kls: dict[str, float] = {}
    others: dict[str, tuple[float | None, float | None]] = {}  # accuracy, loss on the old domain
    for name in wanted:
        variants.become(name)
        losses[name], kls[name] = _losses(model, examples, length, reference, head, name)
        accuracy = old_loss = None
        if held_out.labels is not None:
            scores = score_labels(model, held_out.records, held_out.labels, data, task=f"labels, {name}")
            accuracy = scores.accuracy
        if held_out.old_domain:
            old_loss = held_out_loss(model, held_out.old_domain, length, task=f"old domain, {name}").mean
        others[name] = accuracy, old_loss
    variants.become("base")
    confidence = held_out.config.evaluate.confidence
    base, adapter = losses["base"], losses["adapter"]
    gain = base.nll - adapter.nll
    table = {}
    for name in wanted:
        kept = base.nll - losses[name].nll
        table[name] = VariantFigures(
            losses[name].mean,
            kls[name],
            *others[name],
            gain_kept=_share(kept, gain),
            gain_kept_interval=_share_interval(kept, gain, confidence),
            kl_removed=1 - kls[name] / kls["base"] if kls["base"] else 1.0,
        )
    interval = bootstrap_ratio_interval(gain, base.weight, confidence)
    old_domain = len(held_out.old_domain)
    gained = base.mean - adapter.mean
    return Effect(len(examples), held_out.split, old_domain, confidence, gained, interval, table)


@torch.no_grad()
def _losses(
    model: Any, examples: Sequence[Example], length: int, reference: Sequence[Tensor], head: Tensor, name: str
) -> tuple[HeldOutLoss, float]:
    """Loss of each example, and mean KL from the reference's states, weighted like the loss."""
    nll, weight = np.zeros(len(examples)), np.zeros(len(examples))
    divergence = total = 0.0
    found_by_sequence = predicted_states(model, examples, length, f"loss, {name}", _nothing)
    for wanted, found in zip(reference, found_by_sequence, strict=True):
        losses = token_nll(found.hidden, head, found.targets).double().cpu().numpy()
        np.add.at(nll, found.example, losses * found.weights)
        np.add.at(weight, found.example, found.weights)
        divergence += float((token_kl(wanted, found.hidden, head).double().cpu().numpy() * found.weights).sum())
        total += float(found.weights.sum())
    return HeldOutLoss(nll, weight), divergence / total


def _nothing() -> None:
    return None


def _share(kept: NDArray[np.float64], gain: NDArray[np.float64]) -> float | None:
    total = float(gain.sum())
    return float(kept.sum()) / total if total else None


def _share_interval(
    kept: NDArray[np.float64], gain: NDArray[np.float64], confidence: float
) -> tuple[float, float] | None:
    """Bootstrap interval of the gain kept, both gains drawn from the same examples."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(NUM_RESAMPLES):
        drawn = rng.integers(len(kept), size=len(kept))
        if total := float(gain[drawn].sum()):
            shares.append(float(kept[drawn].sum()) / total)
    if not shares:
        return None
    low, high = np.quantile(shares, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def describe_effect(effect: Effect) -> list[str]:
    """A table with one line per variant."""
    base = effect.variants["base"]
    accuracy, old = base.accuracy is not None, base.old_domain_loss is not None
    lines = [
        f"{f'on {effect.rows} {effect.split} examples':30}     loss  gain kept  KL to adapter  removed"
        + ("  accuracy" if accuracy else "")
        + ("  old domain" if old else "")
    ]
    for name, found in effect.variants.items():
        kept = "-" if found.gain_kept is None else f"{found.gain_kept:.1%}"
        line = f"{NAMES[name]:30} {found.loss:8.4f}  {kept:>9}  {found.kl:13.2e}  {found.kl_removed:7.1%}"
        line += f"  {found.accuracy:8.3f}" if accuracy else ""
        lines.append(line + (f"  {found.old_domain_loss:10.4f}" if old else ""))
    return lines


# ---- the recipe's thresholds


def compare_with_thresholds(effect: Effect, rounding: Rounding, config: ExportConfig) -> Verdict:
    """Compare the written variant with the recipe's thresholds.

    A gain of the adapter that its interval does not tell from none is not judged: a share of nothing says nothing.

    Args:
        effect: measured.
        rounding: of the variant that was written.
        config: thresholds.
    """
    found = effect.variants[rounding]
    reasons, notes = [], []
    low, high = effect.gain_interval
    if low <= 0 <= high or effect.gain <= 0 or found.gain_kept is None:
        notes.append(
            f"the adapter's gain on these examples, {effect.gain:.4f} nats [{low:.4f}, {high:.4f}], cannot be "
            "distinguished from zero, so the share that is kept was not judged"
        )
    elif not config.min_gain_kept <= found.gain_kept <= config.max_gain_kept:
        reasons.append(
            f"it keeps {found.gain_kept:.1%} of the adapter's gain, where {config.min_gain_kept:.0%} to "
            f"{config.max_gain_kept:.0%} are allowed"
        )
    if 1 - found.kl_removed > config.max_kl_share:
        reasons.append(
            f"its KL to base + adapter is {1 - found.kl_removed:.0%} of the base's, where {config.max_kl_share:.0%} "
            "are allowed"
        )
    return Verdict(not reasons, reasons, notes)


def require_kept(effect: Effect, rounding: Rounding) -> None:
    """Stop an export that lost the fine-tune.

    Raises:
        CheckError: names what was lost and the ways of serving that keep more.
    """
    if effect.verdict is None or effect.verdict.kept:
        return
    written = effect.variants[rounding]
    better = [
        f"{NAMES[name]} ({found.gain_kept:.0%} of the gain, KL {found.kl_removed:.0%} removed)"
        for name, found in effect.variants.items()
        if name in ("adapter", "bf16", "compensated", "stochastic") and name != rounding
        if found.gain_kept is not None and found.kl_removed > written.kl_removed
    ]
    raise CheckError(
        f"the merge lost the fine-tune: {'; '.join(effect.verdict.reasons)}",
        why="an update far below half a step of the 4-bit grid can only be kept where inputs are uneven",
        fix=f"these keep more: {', '.join(better) or 'none measured'}; or train longer or at a higher rate",
    )
