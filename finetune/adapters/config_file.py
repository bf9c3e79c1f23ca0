"""Reads adapter_config.json and checks its types, and finds the adapter that a path on the command line means.

Free of torch, so that a misspelt path is reported at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.config.suggest import suggest_run
from finetune.errors import InputError
from finetune.files import read_json

CONFIG = "adapter_config.json"
_MAX_PATTERN = 500  # characters
_MAX_REPEATS = 3  # of `*`, `+` and `{` in a pattern: more of them, or nested ones, can make a search endless
_FIX = "use the adapter_config.json that was written with the tensors"


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read an adapter_config.json.

    Raises:
        InputError: it is missing, not a JSON object, or a setting that is used here has another type than PEFT's.
    """
    config = read_json(path)
    for key, (is_right, words) in _SETTINGS.items():
        if config.get(key) is not None and not is_right(config[key]):
            raise InputError(f"{path}: {key} is {str(config[key])[:80]!r}, not {words}", fix=_FIX)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            _check_pattern(path, key, pattern)
    return config


def _check_pattern(path: Path, key: str, pattern: str) -> None:
    repeats = sum(map(pattern.count, "*+{"))
    if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise InputError(f"{path}: {key} has the pattern {pattern[:80]!r}, whose search may never end", fix=_FIX)
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: {key} has the pattern {pattern[:80]!r}: {error}", fix=_FIX) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _maps_to(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (_maps_to(_is_rank), "names with whole numbers"),
    "alpha_pattern": (_maps_to(_is_number), "names with numbers"),
    "target_parameters": (_is_names, "a list of names"),
    "target_modules": (_is_names, "a list of names"),
    "base_model_name_or_path": (_is_text, "text"),
    "revision": (_is_text, "text"),
}


def resolve_run(path: Path) -> tuple[Path, Path | None]:
    """Find the adapter that a path means.

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
    raise InputError(
        f"{path} {found}", fix=suggest_run(path) or "give a run directory, or one with adapter_config.json"
    )
