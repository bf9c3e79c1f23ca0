"""Whether a merge kept the fine-tune, by the recipe's thresholds, and what to serve instead if not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.config.schema import ExportConfig
from finetune.errors import CheckError
from finetune.export.options import Rounding
from finetune.export.variants import NAMES


def judge(facts: Mapping[str, Any], rounding: Rounding, config: ExportConfig) -> dict[str, Any]:
    """Compare the written variant with the thresholds.

    Args:
        facts: from `measure_variants`.
        rounding: which variant was written.
        config: thresholds.

    Returns:
        `kept` (did it pass), `reasons` in words if not, and `notes` on what could not be judged. A gain of the adapter
        that its interval does not tell from none is not judged: a share of nothing says nothing.
    """
    found = facts["variants"][rounding]
    reasons, notes = [], []
    low, high = facts["gain_interval"]
    if low <= 0 <= high or facts["gain"] <= 0:
        notes.append(
            f"the adapter's gain on these rows, {facts['gain']:.4f} nats [{low:.4f}, {high:.4f}], cannot be told from "
            "none, so how much of it is kept was not judged"
        )
    elif not config.min_gain_kept <= found["gain_kept"] <= config.max_gain_kept:
        reasons.append(
            f"it keeps {found['gain_kept']:.1%} of the adapter's gain, where {config.min_gain_kept:.0%} to "
            f"{config.max_gain_kept:.0%} are allowed"
        )
    if 1 - found["kl_removed"] > config.max_kl_share:
        reasons.append(
            f"its KL to base + adapter is {1 - found['kl_removed']:.0%} of the base's, where {config.max_kl_share:.0%} "
            "are allowed"
        )
    return {"kept": not reasons, "reasons": reasons, "notes": notes}


def require_kept(facts: Mapping[str, Any], rounding: Rounding, verdict: Mapping[str, Any]) -> None:
    """Stop an export that lost the fine-tune.

    Raises:
        CheckError: names what was lost and which ways of serving keep more.
    """
    if verdict["kept"]:
        return
    table = facts["variants"]
    better = [
        f"{NAMES[name]} ({found['gain_kept']:.0%} of the gain, KL {found['kl_removed']:.0%} removed)"
        for name, found in table.items()
        if name in ("adapter", "bf16", "compensated", "stochastic") and name != rounding
        if found["gain_kept"] is not None and found["kl_removed"] > table[rounding]["kl_removed"]
    ]
    raise CheckError(
        f"the merge lost the fine-tune: {'; '.join(verdict['reasons'])}",
        why="an update far below half a step of the 4-bit grid can only be kept where inputs are uneven",
        fix=f"these keep more: {', '.join(better) or 'none measured'}; or train longer or at a higher rate",
    )
