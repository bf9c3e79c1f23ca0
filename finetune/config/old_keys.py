"""The names that keys had in 0.1. Recipes, overrides and stored runs that use them work throughout 0.2."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune import log
from finetune.config.fields import Plain
from finetune.config.schema_paths import KeyPath, dotted
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.config.layers import Layer

# Path of a key in 0.1, and its name since.
RENAMED: Mapping[KeyPath, str] = {
    ("data", "on_bad_row"): "on_bad_record",
    ("data", "max_skipped_share"): "max_skipped_ratio",
    ("trainer", "rows_per_micro_step"): "micro_batch_size",
    ("trainer", "micro_steps"): "gradient_accumulation_steps",
    ("trainer", "final_learning_rate_share"): "min_lr_ratio",
    ("trainer", "warmup_share"): "warmup_ratio",
    ("trainer", "adam_epsilon"): "adam_eps",
    ("trainer", "max_gradient_norm"): "max_grad_norm",
    ("evaluate", "validation_rows"): "validation_examples",
    ("evaluate", "test_rows"): "test_examples",
    ("evaluate", "routing_samples"): "routing_examples",
    ("export", "read_back_rows"): "read_back_examples",
    ("export", "survival_rows"): "survival_examples",
}
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_reported: set[str] = set()


def current_key(path: KeyPath) -> KeyPath:
    """Give a key's present path; any other path comes back as it is."""
    new = RENAMED.get(path[:2])
    return path if new is None else (path[0], new, *path[2:])


def current_text(text: str) -> str:
    """Write references to keys, such as `${trainer.epochs}`, with the keys' present names."""
    return _REFERENCE.sub(lambda match: f"${{{dotted(current_key(tuple(match[1].split('.'))))}}}", text)


def current_data(data: Plain) -> Plain:
    """Give plain configuration data with the keys' present names, without a message."""
    return {section: _current_section(section, value) for section, value in data.items()}


def with_current_keys(layer: Layer, *, stored: bool = False) -> Layer:
    """Give a layer with the keys' present names, and log what was renamed, once per process.

    Args:
        layer: a recipe, the command line, or what a run directory keeps.
        stored: the file of a run, which nobody should edit: one line for all its keys.

    Raises:
        ConfigError: a key is set under both of its names.
    """
    old = [path for path in RENAMED if path in layer.lines]
    for path in old:
        new = current_key(path)
        if new in layer.lines:
            raise ConfigError(
                f"{layer.place(path)}: {dotted(path)} is the old name of {dotted(new)}, which {layer.place(new)} sets",
                fix=f"keep {dotted(new)}",
            )
        if not stored:
            _once(log.warning, f"{layer.place(path)}: {dotted(path)} is now called {dotted(new)}; 0.2 reads both names")
    if old and stored:
        example = f"{dotted(old[0])} as {dotted(current_key(old[0]))}"
        text = f"{layer.label} was written by version 0.1: {len(old)} keys are read under new names, such as {example}"
        _once(log.info, text)
    lines = {current_key(path): line for path, line in layer.lines.items()}
    return replace(layer, data=current_data(layer.data), lines=lines)


def _current_section(section: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {current_key((section, key))[-1]: _current_references(item) for key, item in value.items()}
    return _current_references(value)


def _current_references(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _current_references(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_current_references(item) for item in value]
    return current_text(value) if isinstance(value, str) else value


def _once(write: Callable[[str], None], line: str) -> None:
    if line not in _reported:
        _reported.add(line)
        write(line)
