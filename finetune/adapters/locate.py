"""Which adapter, and which run, a path on the command line means. No torch: a misspelt one is told at once."""

from __future__ import annotations

from pathlib import Path

from finetune.adapters.config_file import CONFIG
from finetune.config.near import near_runs
from finetune.errors import InputError


def resolve_run(path: Path) -> tuple[Path, Path | None]:
    """Find the adapter a command means.

    Args:
        path: a run directory, or an adapter directory (in a run or alone).

    Returns:
        The adapter's directory, and the run's if it belongs to one.

    Raises:
        InputError: neither.
    """
    if (path / CONFIG).is_file():
        return path, path.parent if path.name == "adapter" and (path.parent / "config.yaml").is_file() else None
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter", path
    if (path / "config.yaml").is_file():
        raise InputError(f"run {path} has no adapter yet", fix=f"finish it: finetune train --resume {path}")
    found = "is neither a run nor an adapter directory" if path.is_dir() else "does not exist"
    raise InputError(f"{path} {found}", fix=near_runs(path) or "give a run directory, or one with adapter_config.json")
