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

from finetune.config.layers import COMMAND_LINE, Layer, read_yaml
from finetune.config.lint import Problem, raise_problems, unknown_key, unknown_keys
from finetune.config.recipes import checked_option, option_file
from finetune.config.rules import broken_rules
from finetune.config.schema import RunConfig
from finetune.config.suggest import allowed_words, children, describe, dotted, suggest_word, type_at
from finetune.errors import ConfigError, InputError


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


# A resumed run keeps its configuration, except for the processes that carry it out.


def resumed_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Put other processes under a run.

    A step's rows stay the same: with another number of processes each makes more or fewer micro-steps.

    Args:
        config: as the run was started.
        overrides: `distributed=KIND` and `distributed.KEY=VALUE`.

    Raises:
        ConfigError: they cannot be read, or the step's micro-steps cannot be dealt to that many processes.
    """
    plain = to_plain(config)
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "distributed":
            option = checked_option("distributed", value, COMMAND_LINE)
            plain["distributed"] = dict(read_yaml(option_file("distributed", option)).data)
    given = {
        key.removeprefix("distributed."): yaml.safe_load(value)
        for key, _, value in (text.partition("=") for text in overrides)
        if key != "distributed"
    }
    layer = Layer(COMMAND_LINE, {"distributed": given}, {("distributed", key): None for key in given})
    raise_problems(list(unknown_keys(layer)), [layer])
    plain["distributed"] |= given
    _deal_anew(plain, config)
    return validate(plain, [layer])


def _deal_anew(plain: dict[str, Any], config: RunConfig) -> None:
    """Keep the micro-steps of a step in all."""
    processes = plain["distributed"]["num_processes"]
    in_all = config.trainer.gradient_accumulation_steps * config.distributed.num_processes
    if not isinstance(processes, int) or processes < 1:
        return  # `validate` says so
    if in_all % processes:
        counts = [str(count) for count in range(1, in_all + 1) if in_all % count == 0]
        raise ConfigError(
            f"{processes} processes cannot share the {in_all} micro-steps of a step evenly",
            why="a resumed run keeps the rows of every step",
            fix=f"resume with {', '.join(counts)} processes",
        )
    plain["trainer"]["gradient_accumulation_steps"] = in_all // processes
