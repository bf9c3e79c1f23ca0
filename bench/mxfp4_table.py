"""The tables of `mxfp4_merge.py`: share kept by each way of rounding, controls, and comparison with the goals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from measure import machine, publish
from torch import device

METHODS = ("bf16", "nearest", "nearest, floor scales", "nearest, ceil scales", "stochastic", "compensated")
GOALS = {"1 %": (0.90, 0.75), "4 %": (0.95, 0.90), "10 %": (0.95, 0.90)}  # gain kept, KL removed, at least
MOST = 1.05  # of the gain: more is another function than the adapter's
NOTE = (
    "Test rows. Gain kept: share of the adapter's gain in held-out loss, mean over seeds [least, most]. KL removed: "
    "1 - KL(adapter || variant) / KL(adapter || base). Old domain: loss on medical rows, nats a token. Controls and "
    "settings are of seed 0, held against the real adapter; `attention alone` is an adapter of its own, trained with "
    "the same rate and merged in bf16. Intervals by bootstrap over rows are in the JSON."
)
Results = Mapping[str, Any]


def say_and_save(results: Results, seeds: Iterable[int], save: str | None) -> None:
    """Print the table; with a name, also write it to bench/results."""
    rows = [row for size in GOALS for row in _of_size(results, size, list(seeds))]
    facts = machine(device("cpu"))
    publish(save or "mxfp4-merge", "Merging back to MXFP4", facts, rows, save=save is not None, note=NOTE, raw=results)
    for size, (gain, removed) in GOALS.items():
        found = _figures(results, size, list(seeds), "compensated")
        if found:
            least, most = (bound(each["gain_kept"] for each in found) for bound in (min, max))
            divergence = min(each["kl_removed"] for each in found)
            verdict = "met" if gain <= least and most <= MOST and divergence >= removed else "MISSED"
            print(f"{size}: goal {verdict} by every one of {len(found)} seeds: kept {least:.1%} to {most:.1%} "
                  f"(at least {gain:.0%}), KL removed {divergence:.1%} (at least {removed:.0%})")  # fmt: skip


def _figures(results: Results, size: str, seeds: list[int], method: str) -> list[dict[str, Any]]:
    found = [results[key] for seed in seeds if (key := f"{size} seed {seed}") in results]
    return [each["variants"][method] for each in found]


def _of_size(results: Results, size: str, seeds: list[int]) -> Iterable[dict[str, Any]]:
    found = [results[key] for seed in seeds if (key := f"{size} seed {seed}") in results]
    if not found:
        return
    update = f"{size} (measured: {mean(each['weights']['update'] for each in found):.1%})"
    for method in ("base", "adapter", *METHODS):
        figures = _figures(results, size, seeds, method)
        row = {"update": update, "served as": method, "seeds": len(figures)}
        row["loss"] = round(mean(each["loss"] for each in figures), 4)
        if method not in ("base", "adapter"):
            row |= _kept(figures)
        yield row | {"old domain": round(mean(each["old_domain_loss"] for each in figures), 3)}
    for key, found_there in results.items():
        if key.startswith(f"{size} ") and "seed" not in key and "accuracy" not in key:
            name = "bf16" if "attention" in key else "compensated"
            row = {"update": update, "served as": key.removeprefix(f"{size} "), "seeds": 1}
            figures = [found_there["variants"][name]]
            yield row | {"loss": round(figures[0]["loss"], 4)} | _kept(figures)


def _kept(figures: list[dict[str, Any]]) -> dict[str, str]:
    gains, removed = ([100 * each[key] for each in figures] for key in ("gain_kept", "kl_removed"))
    spread = f" [{min(gains):.1f}, {max(gains):.1f}]" if len(gains) > 1 else ""
    return {"gain kept, %": f"{mean(gains):.1f}{spread}", "KL removed, %": f"{mean(removed):.1f}"}
