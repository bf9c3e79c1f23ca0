"""What a merge does to the fine-tune, end to end: every way of serving an adapter on the same held-out rows.

Sums over weights say little: a change of the same size in another direction is noise. Here each variant's loss, label
accuracy and KL to base + adapter are measured on held-out rows, and its loss on rows of the old domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune import log
from finetune.config.schema import RunConfig
from finetune.data.dataset import load_split
from finetune.data.harmony.render import Example
from finetune.data.sources import Record
from finetune.evaluate.evalset import label_set, stratified_subset
from finetune.evaluate.labels import score_labels
from finetune.evaluate.likelihood import HeldOutLoss, held_out_loss, predicted_states
from finetune.evaluate.statistics import bootstrap_ratio_interval
from finetune.export.variants import NAMES, Variants
from finetune.kernels.loss_head import token_kl, token_nll

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that no calibration and no training saw.

    Attributes:
        split: where they are from: `test` or `validation`.
        records, samples: the same rows.
        labels: candidate answers, or None where labels are not scored.
        old_domain: rows of other domains, empty if the recipe names none.
        config: of the run.
    """

    split: str
    records: tuple[Record, ...]
    samples: tuple[Example, ...]
    labels: tuple[str, ...] | None
    old_domain: tuple[Example, ...]
    config: RunConfig


def held_out_rows(config: RunConfig, count: int) -> HeldOutRows | None:
    """The rows a merge is measured on, stratified by answer; None if the recipe has neither test nor validation rows.

    Args:
        config: of the run.
        count: rows at most, of the domain and of the old one.

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
    labels = label_set(split.records) if config.evaluate.labels != "never" else None
    old: tuple[Example, ...] = ()
    if config.export.old_domain:
        other = load_split(replace(data, test=config.export.old_domain), "test")
        old = tuple(other.examples[number] for number in stratified_subset(other.records, count))
    return HeldOutRows(name, records, tuple(split.examples[number] for number in chosen), labels, old, config)


def measure_variants(variants: Variants, rows: HeldOutRows, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure each variant.

    Args:
        variants: of a live model.
        rows: to measure on.
        names: which; None: all that can be made. `base` and `adapter` are always among them.

    Returns:
        Plain figures: `rows`, `split`, `gain` (of the adapter, nats a trained token) with interval, and by variant
        under `variants`: `loss`, `kl` (adapter || variant), `gain_kept` with interval, `kl_removed` (1 - kl / the
        base's), `accuracy` where labels are scored, `old_domain_loss` where there are such rows.
    """
    wanted = [name for name in variants.names() if names is None or name in (*names, "base", "adapter")]
    model, data = variants.base.model, rows.config.data
    head = model.lm_head.weight
    variants.become("adapter")
    reference = [found.hidden for found in predicted_states(model, rows.samples, data.max_length, "adapter", _nothing)]
    losses: dict[str, HeldOutLoss] = {}
    table: dict[str, dict[str, Any]] = {}
    for name in wanted:
        variants.become(name)
        losses[name], divergence = _losses(model, rows.samples, data.max_length, reference, head, name)
        table[name] = {"loss": losses[name].mean, "kl": divergence}
        if rows.labels is not None:
            scores = score_labels(model, rows.records, rows.labels, data, task=f"labels, {name}")
            table[name]["accuracy"] = scores.accuracy
        if rows.old_domain:
            old = held_out_loss(model, rows.old_domain, data.max_length, task=f"old domain, {name}")
            table[name]["old_domain_loss"] = old.mean
    variants.become("base")
    confidence = rows.config.evaluate.confidence
    base, adapter = losses["base"], losses["adapter"]
    gain = bootstrap_ratio_interval(base.nll - adapter.nll, base.weight, confidence)
    for name, figures in table.items():
        figures["gain_kept"] = _share(base.nll - losses[name].nll, base.nll - adapter.nll)
        figures["gain_kept_interval"] = _share_interval(base.nll - losses[name].nll, base.nll - adapter.nll, confidence)
        figures["kl_removed"] = 1 - figures["kl"] / table["base"]["kl"] if table["base"]["kl"] else 1.0
    return {
        "rows": len(rows.samples),
        "split": rows.split,
        "old_domain_rows": len(rows.old_domain),
        "confidence": confidence,
        "gain": base.mean - adapter.mean,
        "gain_interval": list(gain),
        "variants": table,
    }


@torch.no_grad()
def _losses(
    model: Any, samples: Sequence[Example], row_tokens: int, reference: Sequence[Tensor], head: Tensor, name: str
) -> tuple[HeldOutLoss, float]:
    """Loss of each sample, and mean KL from the reference's states, weighted like the loss."""
    nll, weight = np.zeros(len(samples)), np.zeros(len(samples))
    divergence = total = 0.0
    found_by_row = predicted_states(model, samples, row_tokens, f"loss, {name}", _nothing)
    for wanted, found in zip(reference, found_by_row, strict=True):
        losses = token_nll(found.hidden, head, found.targets).double().cpu().numpy()
        np.add.at(nll, found.example, losses * found.weights)
        np.add.at(weight, found.example, found.weights)
        divergence += float((token_kl(wanted, found.hidden, head).double().cpu().numpy() * found.weights).sum())
        total += float(found.weights.sum())
    return HeldOutLoss(nll, weight), divergence / total


def _share(kept: NDArray[np.float64], wanted: NDArray[np.float64]) -> float | None:
    total = float(wanted.sum())
    return float(kept.sum()) / total if total else None


def _share_interval(
    kept: NDArray[np.float64], wanted: NDArray[np.float64], confidence: float
) -> tuple[float, float] | None:
    """Bootstrap interval of the gain kept, both gains drawn from the same rows."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(NUM_RESAMPLES):
        drawn = rng.integers(len(kept), size=len(kept))
        if total := float(wanted[drawn].sum()):
            shares.append(float(kept[drawn].sum()) / total)
    if not shares:
        return None
    low, high = np.quantile(shares, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def describe_effect(facts: Mapping[str, Any]) -> list[str]:
    """The table, and what its columns mean."""
    table = facts["variants"]
    accuracy, old = "accuracy" in table["base"], "old_domain_loss" in table["base"]
    lines = [
        f"{'on ' + str(facts['rows']) + ' ' + facts['split'] + ' rows':30}     loss  gain kept  KL to adapter  removed"
        + ("  accuracy" if accuracy else "")
        + ("  old domain" if old else "")
    ]
    for name, found in table.items():
        line = (
            f"{NAMES[name]:30} {found['loss']:8.4f}  {_percent(found['gain_kept']):>9}  {found['kl']:13.2e}  "
            f"{found['kl_removed']:7.1%}"
        )
        line += f"  {found['accuracy']:8.3f}" if accuracy else ""
        lines.append(line + (f"  {found['old_domain_loss']:10.4f}" if old else ""))
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _nothing() -> None:
    return None


def print_effect(facts: Mapping[str, Any]) -> None:
    """Print the table as the command's result."""
    for line in describe_effect(facts):
        log.result(line)
