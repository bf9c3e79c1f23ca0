"""Small pieces of text that reports share."""

from __future__ import annotations

import re
from typing import Any


def code(text: str) -> str:
    """Text of a person's own as code, whatever stands in it."""
    line = " ".join(text.split())
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (max(map(len, re.findall("`+", line))) + 1)
    return f"{fence} {line} {fence}"


def summary(manifest: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """What a run did, in a few sentences of Markdown."""
    status = manifest.get("status", "unknown")
    parts = [f"Recipe {code(manifest.get('recipe', '?'))}, status: **{status}**."]
    if stopped := manifest.get("stopped_by"):
        parts.append(f"It was stopped by {code(stopped)}.")
    if "minutes" in manifest:
        parts.append(f"Took {manifest['minutes']} minutes and at most {manifest['peak_memory_gib']} GiB.")
    if "after" in evaluation:
        before, after = evaluation["before"], evaluation["after"]
        parts.append(f"Test loss went from {before['loss']:.3f} to {after['loss']:.3f} nats per trained token.")
        if "accuracy" in after:
            parts.append(f"Accuracy went from {before['accuracy']:.3f} to {after['accuracy']:.3f}.")
    return " ".join(part for part in parts if part)


def with_interval(figures: dict[str, Any], key: str) -> str:
    """A figure with its interval, which stands beside it in evaluation.json; one row has none."""
    if (interval := figures[f"{key}_interval"]) is None:
        return f"{figures[key]:.3f} (one row: no interval)"
    return f"{figures[key]:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def check_lines(manifest: dict[str, Any]) -> list[str]:
    """What was checked, as items of a Markdown list."""
    lines = [f"- {line}" for line in manifest.get("audit") or []]
    match manifest.get("read_back"):
        case {"skipped": reason}:
            lines.append(f"- **not read back** with stock PEFT: {reason}")
        case {"conclusive": False, "effect_kl": effect, "mean_kl": found}:
            lines.append(
                f"- read back by stock PEFT, **inconclusive**: the adapter changes so little (KL {effect:.1e}) that "
                f"ignoring it would hardly show (KL {found:.1e} found)"
            )
        case {"max_difference": difference, "effect": effect, "samples": samples}:
            lines.append(
                f"- read back by stock PEFT in a fresh process: logits differ by {difference:.1e} at most on {samples} "
                f"samples (the adapter itself moves them by {effect:.1f})"
            )
    if "adapter_of_step" in manifest:
        lines.append(f"- the adapter is the one of step {manifest['adapter_of_step']} (best validation loss)")
    return lines
