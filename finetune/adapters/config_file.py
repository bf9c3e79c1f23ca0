"""Reads adapter_config.json and checks its types, and finds the adapter that a path on the command line means.

Free of torch, so that a misspelt path is reported at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.derive import lora_scale
from finetune.config.suggest import suggest_run
from finetune.errors import InputError
from finetune.files import read_json

CONFIG = "adapter_config.json"
_MAX_PATTERN = 500  # characters
_MAX_REPEATS = 3  # of `*`, `+` and `{` in a pattern: more of them, or nested ones, can make a search endless
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # and the values that ask for nothing
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
}
_FIX = "use the adapter_config.json that was written with the tensors"


@dataclass(frozen=True)
class PeftConfig:
    """An adapter_config.json whose settings have PEFT's types.

    Attributes:
        settings: all of the file.
    """

    settings: Mapping[str, Any]

    @property
    def use_rslora(self) -> bool:
        """Whether scales are alpha / sqrt(rank)."""
        return bool(self.settings.get("use_rslora"))

    @property
    def peft_version(self) -> str | None:
        """The release of PEFT that wrote it, if it says so."""
        return self.settings.get("peft_version")

    @property
    def base_name(self) -> str | None:
        """Directory or hub name of the base."""
        return self.settings.get("base_model_name_or_path")

    @property
    def base_revision(self) -> str | None:
        """Of a hub name."""
        return self.settings.get("revision")

    def targets_parameter(self, path: str) -> bool:
        """Whether a parameter is targeted, by its full name or by the end of it (as PEFT matches)."""
        return any(f".{path}".endswith(f".{target}") for target in self.settings.get("target_parameters") or ())

    def rank(self, path: str) -> int:
        """Rank of one weight."""
        return int(self._patterned("rank_pattern", "r", path))

    def scale(self, path: str, rank: int) -> float:
        """Scale of one weight: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        alpha = float(self._patterned("alpha_pattern", "lora_alpha", path))
        return lora_scale(alpha, rank, rslora=self.use_rslora)

    def _patterned(self, patterns: str, default: str, path: str) -> float:
        """The first pattern whose regular expression ends the path (as in PEFT), or the default."""
        for pattern, value in (self.settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return float(value)
        found = self.settings.get(default)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise InputError(f"adapter_config.json: {default} is {found!r}, not a number")
        return found


def read_adapter_config(directory: Path) -> PeftConfig:
    """Read a directory's adapter_config.json.

    Raises:
        InputError: it is missing, not a JSON object, a setting that is used here has another type than PEFT's, or it
            asks for something that nothing here supports (DoRA, biases, fully trained modules).
    """
    path = directory / CONFIG
    settings = read_json(path)
    for key, (is_right, words) in _SETTINGS.items():
        if settings.get(key) is not None and not is_right(settings[key]):
            raise InputError(f"{path}: {key} is {str(settings[key])[:80]!r}, not {words}", fix=_FIX)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(key) or {}:
            _check_pattern(path, key, pattern)
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{directory}: peft_type is {settings.get('peft_type')!r}, only LORA can be exported")
    for key, harmless in _UNSUPPORTED.items():
        if settings.get(key) not in harmless:
            raise InputError(f"{directory}: {key} is {settings[key]!r}, which no export here supports")
    return PeftConfig(settings)


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
