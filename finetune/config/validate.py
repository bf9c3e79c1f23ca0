"""Plain data to a checked `RunConfig`, to and from a run's config.yaml, and with other ranks for a resumed run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from finetune.config.derive import absolute_paths
from finetune.config.fields import Plain
from finetune.config.layers import COMMAND_LINE, Layer, read_yaml
from finetune.config.lint import Problem, raise_problems, unknown_key, unknown_keys
from finetune.config.old_keys import with_current_keys
from finetune.config.recipes import checked_option, option_file
from finetune.config.rules import broken_rules
from finetune.config.schema import RunConfig
from finetune.config.schema_paths import (
    KeyPath,
    allowed_words,
    children,
    describe,
    dotted,
    range_at,
    section_classes,
    section_tags,
    type_at,
)
from finetune.config.suggest import suggest_word
from finetune.errors import ConfigError, InputError

_OUT_OF_RANGE = ("finite_number", "greater_than", "greater_than_equal", "less_than", "less_than_equal")


def validate(plain: Plain, layers: Sequence[Layer] = ()) -> RunConfig:
    """Check a composed configuration against the schema and its rules.

    Args:
        plain: nested dicts, lists and scalars, interpolations resolved.
        layers: the places that set its keys, in the order in which they apply, for the messages.

    Raises:
        ConfigError: an unknown key, a wrong type or value, or a broken rule; names each place and key.
    """
    config, problems = parse(plain)
    raise_problems(problems, layers)
    raise_problems(list(broken_rules(config)), layers)
    return config


def parse(plain: Plain, root: Any = RunConfig) -> tuple[Any, list[Problem]]:
    """Check plain data against the types and ranges of the schema.

    Args:
        plain: as in `validate`.
        root: the schema's top section.

    Returns:
        The section, or None if there are problems; and the problems.
    """
    try:
        # JSON mode, since strict Python mode would refuse dicts for dataclasses and lists for tuples.
        return TypeAdapter(root).validate_json(json.dumps(plain), strict=True), []
    except ValidationError as error:
        return None, [_problem(details, root) for details in error.errors()]


def to_plain(config: RunConfig) -> Plain:
    """Turn a configuration into nested dicts, lists and scalars, every default written out."""
    plain: Plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def dump_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML, in the schema's order, every default written out."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=120)


def load_run_config(path: Path) -> RunConfig:
    """Read the `config.yaml` of a run directory, of version 0.1 too.

    Relative paths, which runs before 0.2 stored, start where the run was started (manifest.json beside the file).

    Raises:
        InputError: there is no such file.
        ConfigError: it is not what `dump_yaml` writes.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing", why="a run directory contains the configuration it was started with")
    layer = with_current_keys(read_yaml(path), stored=True)
    config = validate(layer.data, [layer])
    start = _started_in(path.with_name("manifest.json"))
    return config if start is None else absolute_paths(config, start)


def _started_in(manifest: Path) -> Path | None:
    """The working directory in which a run was started; None if it is not recorded or does not exist."""
    try:
        start = Path(json.loads(manifest.read_text())["working_directory"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return start if start.is_dir() else None


def resumed_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Change the ranks of a run that is resumed.

    Every step keeps its examples: with another number of ranks, each accumulates more or fewer micro-batches.

    Args:
        config: as the run was started.
        overrides: `distributed=KIND` and `distributed.KEY=VALUE`.

    Raises:
        ConfigError: they cannot be read, or the step's micro-batches cannot be shared evenly by that many ranks.
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
    _share_micro_batches(plain, config)
    return validate(plain, [layer])


def _share_micro_batches(plain: Plain, config: RunConfig) -> None:
    """Give each rank its share of a step's micro-batches, whose total stays the same."""
    ranks = plain["distributed"]["num_processes"]
    total = config.trainer.gradient_accumulation_steps * config.distributed.num_processes
    if not isinstance(ranks, int) or ranks < 1:
        return  # `validate` reports it
    if total % ranks:
        counts = [str(count) for count in range(1, total + 1) if total % count == 0]
        raise ConfigError(
            f"{ranks} processes cannot share the {total} micro-batches of a step evenly",
            why="a resumed run keeps the examples of every step",
            fix=f"resume with {', '.join(counts)} processes",
        )
    plain["trainer"]["gradient_accumulation_steps"] = total // ranks


def _problem(details: ErrorDetails, root: Any) -> Problem:
    """Describe one of pydantic's errors."""
    path, tag = _without_tags(tuple(map(str, details["loc"])), root)
    kind, given = type_at(path, root), details["input"]
    if kind is None:
        return unknown_key(path)
    match details["type"]:
        case "missing":
            return Problem(path, "is not set", f"it takes {describe(kind)}")
        case "unexpected_keyword_argument":  # another class of the tagged union has it
            return _key_of_another_kind(path, tag, root)
        case "union_tag_not_found":
            path = (*path, "kind")
            return Problem(path, "is not set", f"it takes {describe(type_at(path, root))}")
        case "union_tag_invalid":
            path = (*path, "kind")
            kind, given = type_at(path, root), given["kind"]
    limits = range_at(path, root)
    if limits is not None and details["type"] in _OUT_OF_RANGE:
        return Problem(path, f"is {given}, must be {limits}")
    return Problem(path, f"is {_show(given)}, must be {describe(kind)}", _fix(path, kind, given))


def _without_tags(loc: KeyPath, root: Any) -> tuple[KeyPath, str]:
    """Take the tag that pydantic writes below a tagged union out of a place; the tag is "" where there is none."""
    path: KeyPath = ()
    tag = ""
    parts = iter(loc)
    for part in parts:
        if len(section_classes(type_at(path, root))) > 1:
            tag, part = part, next(parts, "")
            if not part:
                break
        path = (*path, part)
    return path, tag


def _key_of_another_kind(path: KeyPath, tag: str, root: Any) -> Problem:
    section = dotted(path[:-1])
    owners = [
        word
        for each in section_classes(type_at(path[:-1], root))
        if path[-1] in children(each)
        for word in section_tags(each)
    ]
    fix = f"it belongs to {' or '.join(owners)}: choose {section}={owners[0]}"
    return Problem(path, f"is no key of {section}.kind={tag}", fix)


def _fix(path: KeyPath, kind: Any, given: Any) -> str | None:
    words = allowed_words(kind)
    if isinstance(given, str) and len(path) == 1 and children(kind):
        return (
            f"to choose one of the group's files write `{path[0]}={given}`, in a recipe `override /{path[0]}: {given}`"
        )
    if isinstance(given, str) and words:
        is_list = get_origin(kind) in (tuple, list)
        return f"write a list: [{given}]" if is_list and given in words else suggest_word(given, words)
    if isinstance(given, bool) and {"yes", "no"} & set(words):
        return f'YAML reads a bare yes or no as true or false; write {path[-1]}: "yes" with quotes'
    if isinstance(given, int | float) and (kind is str or kind == str | None):
        return f"""put it in quotes: {path[-1]}: "{given}" in a file, {dotted(path)}='"{given}"' on the command line"""
    return None


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
