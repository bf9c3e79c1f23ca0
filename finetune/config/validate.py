"""From plain data to a checked `RunConfig`, and back to the YAML that a run directory keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from finetune.config.keys import allowed_words, children, describe, dotted, suggest_word, type_at
from finetune.config.layers import Layer, read_yaml
from finetune.config.problems import Problem, raise_problems, unknown_key
from finetune.config.rules import broken_rules
from finetune.config.schema import RunConfig
from finetune.errors import InputError


def validate(plain: Mapping[str, Any], layers: Sequence[Layer] = ()) -> RunConfig:
    """Check a composed configuration against the schema and its rules.

    Args:
        plain: nested dicts, lists and scalars, interpolations resolved.
        layers: the places that set its keys, in the order in which they apply, for the messages.

    Raises:
        ConfigError: an unknown key, a wrong type or value, or a rule broken; names each place and key.
    """
    try:
        # JSON mode, since strict Python mode would refuse dicts for dataclasses and lists for tuples.
        config = TypeAdapter(RunConfig).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        raise_problems([_translate(details) for details in error.errors()], layers)
        raise  # not reached: a ValidationError holds at least one error
    raise_problems(list(broken_rules(config)), layers)
    return config


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Turn a configuration into nested dicts, lists and scalars, every default written out."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def dump_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML, in the schema's order, every default written out."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=120)


def load_run_config(path: Path) -> RunConfig:
    """Read the `config.yaml` of a run directory.

    Raises:
        InputError: there is no such file.
        ConfigError: it is not what `dump_yaml` wrote for this version's schema.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing", why="a run directory holds the configuration it was started with")
    layer = read_yaml(path)
    return validate(layer.data, [layer])


def _translate(details: ErrorDetails) -> Problem:
    """Turn one of pydantic's errors into words about the key."""
    path = tuple(str(part) for part in details["loc"])
    kind = type_at(path)
    if kind is None:
        return unknown_key(path)
    if details["type"] == "missing":
        return Problem(path, "is not set", f"it takes {describe(kind)}")
    given = details["input"]
    what = f"is {_show(given)}, must be {describe(kind)}"
    return Problem(path, what, _fix(path, kind, given))


def _fix(path: tuple[str, ...], kind: Any, given: Any) -> str | None:
    words = allowed_words(kind)
    if isinstance(given, str) and len(path) == 1 and children(kind):
        return (
            f"to choose one of the group's files write `{path[0]}={given}`, in a recipe `override /{path[0]}: {given}`"
        )
    if isinstance(given, str) and words:
        return suggest_word(given, words)
    if isinstance(given, bool) and {"yes", "no"} & set(words):
        return f'YAML reads a bare yes or no as true or false; write {path[-1]}: "yes" with quotes'
    if isinstance(given, int | float) and (kind is str or kind == str | None):
        return f"""put it in quotes: {path[-1]}: "{given}" in a file, {dotted(path)}='"{given}"' on the command line"""
    return None


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
