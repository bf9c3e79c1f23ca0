"""Shared parts of the benchmark programs: environment, interleaved timing, peak memory, results as table and JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes")


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and command of this run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def _commit() -> str:
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", ":/", ":(top,exclude)bench/results"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def interleaved(
    functions: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call: one warm-up each, then `repeats` rounds in turn, so that a busy moment affects all alike.

    On a CPU they are processor seconds: on a shared machine wall time depends on other programs.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for number in range(repeats):
        names = list(functions) if number % 2 == 0 else list(functions)[::-1]
        for name in names:
            _wait(device)
            started = clock()
            functions[name]()
            _wait(device)
            seconds[name].append(clock() - started)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call above that before it: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the highest resident size so far
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and most, in milliseconds."""
    return {
        "median_ms": round(median(seconds) * 1e3, 2),
        "least_ms": round(min(seconds) * 1e3, 2),
        "most_ms": round(max(seconds) * 1e3, 2),
    }


def publish(
    name: str,
    title: str,
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
    *,
    save: bool,
    note: str,
    raw: object = None,
) -> None:
    """Print a Markdown table and JSON; with `save` also write both under `bench/results/`, dated.

    Args:
        raw: the measurements behind the table; written to the JSON file only.
    """
    table = _table(title, facts, rows, note)
    report = {"machine": facts, "note": note, "rows": rows}
    print(table)
    print(json.dumps(report, indent=2))
    content = json.dumps(report | ({} if raw is None else {"raw": raw}), indent=2)
    if save:
        stem = RESULTS / f"{facts['date']}-{name}"
        stem.with_suffix(".md").write_text(table, encoding="utf-8")
        stem.with_suffix(".json").write_text(content + "\n", encoding="utf-8")


def _table(title: str, facts: dict[str, Any], rows: list[dict[str, Any]], note: str) -> str:
    hardware = facts.get("gpu") or f"{facts['cores']} cores of {facts['cpu']}, {facts['threads']} threads"
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        f"# {title}, {facts['date']}",
        "",
        f"{hardware}; load {facts['load']} at the start; {versions}; commit {facts['commit']}.",
        f"`{facts['command']}`",
        "",
        note + ("" if "gpu" in facts else " Times are processor seconds, the variants in turn, on a shared machine."),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value and abs(value) < 1e-2:
        return f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
