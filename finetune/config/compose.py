"""Compose a recipe, the shipped configs/ and the command line into one configuration. The only file that imports Hydra.

Hydra merges files and reads overrides, and nothing else. Every layer is checked against the schema before Hydra sees
it, because Hydra itself accepts `+misspelt=3` silently, and the result is validated as a whole.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config.fields import Plain
from finetune.config.layers import COMMAND_LINE, Layer, place_of, read_yaml
from finetune.config.lint import lost_mappings, raise_problems, refuse_code, unknown_keys
from finetune.config.old_keys import current_key, current_text, with_current_keys
from finetune.config.paths import shipped_dir
from finetune.config.recipes import (
    checked_option,
    default_choices,
    find_recipe,
    groups,
    option_file,
    options,
    recipe_name,
    split_recipe,
)
from finetune.config.schema import RunConfig
from finetune.config.schema_paths import KeyPath, dotted
from finetune.config.validate import validate
from finetune.errors import ConfigError


@dataclass(frozen=True)
class ComposedConfig:
    """A checked configuration and where it came from.

    Attributes:
        config: what the run uses.
        recipe_name: a shipped recipe's name, or the stem of one's own file.
        overrides: the command line's overrides as typed.
    """

    config: RunConfig
    recipe_name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class _CommandLine:
    """Parsed overrides: the text after each `=` by key, the options of groups, and the same as a layer."""

    texts: Mapping[KeyPath, str]
    choices: Mapping[str, str]
    layer: Layer


def compose(recipe: str, overrides: Sequence[str] = ()) -> ComposedConfig:
    """Compose and check a configuration.

    Args:
        recipe: a shipped recipe's name or the path of a recipe file.
        overrides: `group=option`, `key=value`, `+key=value` or `++key=value`; the plus signs change nothing, since
            every key of the schema has its place already.

    Raises:
        ConfigError: anything in the recipe or the overrides that cannot be used, named with its place.
    """
    path = find_recipe(recipe)
    recipe_layer, recipe_choices = split_recipe(with_current_keys(read_yaml(path)))
    command_line = _read_overrides(overrides)
    choices = default_choices() | recipe_choices | dict(command_line.choices)
    files = [read_yaml(option_file(group, option)).below(group) for group, option in choices.items()]
    layers = [*files, recipe_layer, command_line.layer]
    for layer in layers:
        refuse_code(layer)
    # An unknown key hides nothing else, so all of them are named at once.
    raise_problems([problem for layer in layers for problem in unknown_keys(layer)], layers)
    plain = _run_hydra(recipe_layer.data, choices, command_line.texts, layers)
    raise_problems(list(lost_mappings([recipe_layer, command_line.layer], plain)), layers)
    return ComposedConfig(validate(plain, layers), recipe_name(path), tuple(overrides))


def _read_overrides(overrides: Sequence[str]) -> _CommandLine:
    parser = OverridesParser.create()
    texts: dict[KeyPath, str] = {}
    choices: dict[str, str] = {}
    data: Plain = {}
    lines: dict[KeyPath, int | None] = {}
    for text in map(_with_quotes, overrides):
        try:
            override = parser.parse_override(text)
        except (HydraException, ValueError, RecursionError) as error:  # a number too long, brackets too deep to read
            fix = """write key=value; a value with spaces, commas or brackets in quotes: key='"a, b"'"""
            raise ConfigError(f"{COMMAND_LINE}: {text[:200]!r} cannot be read as an override", fix=fix) from error
        if override.is_delete():
            raise ConfigError(
                f"{COMMAND_LINE}: {text!r} deletes a key",
                fix="set it to another value, or leave it out in a recipe of your own",
            )
        if override.is_sweep_override():
            raise ConfigError(
                f"{COMMAND_LINE}: {text!r} gives several values",
                fix=f"one run for each is --sweep {shlex.quote(text)}; a list is key=[a,b]; a text with a comma is "
                f"""'{text.partition("=")[0]}="{text.partition("=")[2]}"'""",
            )
        key = override.key_or_group
        if key in groups():
            choices[key] = _chosen_option(override, text)
            continue
        if override.package is not None:
            raise ConfigError(f"{COMMAND_LINE}: {text!r} names a package (@)", fix="write key=value or group=option")
        path, value = tuple(key.split(".")), override.value()
        texts[path] = text.partition("=")[2]
        lines |= dict.fromkeys([path, *_below(value, path)])
        section = data
        for number, part in enumerate(path[:-1], 1):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                above = ".".join(path[:number])
                raise ConfigError(
                    f"{COMMAND_LINE}: {text!r} sets a key of {above}, and another override sets {above} itself",
                    fix="leave one of the two out",
                )
        section[path[-1]] = value
    layer = with_current_keys(Layer(COMMAND_LINE, data, lines))
    return _CommandLine({current_key(path): current_text(text) for path, text in texts.items()}, choices, layer)


def _with_quotes(text: str) -> str:
    """Quote a value with a bare `=`, as in `adapter.experts.select=top_p=0.2`, which Hydra does not accept."""
    key, _, value = text.partition("=")
    return f'{key}="{value}"' if "=" in value and not set(value) & set("\"'[]{}(),\\$ ") else text


def _chosen_option(override: Override, text: str) -> str:
    group, option = override.key_or_group, override.value()
    if text.startswith("+") or override.package is not None or not isinstance(option, str):
        raise ConfigError(
            f"{COMMAND_LINE}: {text!r} does not choose a file of the group {group}",
            fix=f"write {group}=OPTION with one of {', '.join(options(group))}, or set single keys: {group}.KEY=VALUE",
        )
    return checked_option(group, option, COMMAND_LINE)


def _run_hydra(
    recipe: Plain, choices: Mapping[str, str], texts: Mapping[KeyPath, str], layers: Sequence[Layer]
) -> Plain:
    """Let Hydra merge the chosen files, the recipe and the overrides, and resolve references to other keys.

    Args:
        recipe: its keys, without `defaults`; given in memory, so that its file may be anywhere.
        choices: an option for each group.
        texts: the overrides as typed after the `=`, by key.
        layers: the same as layers, to name the place of a reference that leads nowhere.
    """
    ConfigStore.instance().store(group="recipe", name="chosen", node=dict(recipe), package="_global_")
    overrides = [f"{group}={option}" for group, option in choices.items()]
    overrides += [f"++{dotted(path)}={text}" for path, text in texts.items()]
    try:
        with initialize_config_dir(str(shipped_dir("configs").resolve()), version_base="1.3"):
            composed = hydra_compose("run", overrides=overrides)
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        path = tuple((error.full_key or "").split("."))
        raise ConfigError(f"{place_of(path, layers)}: {dotted(path)} has no value: {_first_line(error)}") from error
    except (HydraException, RecursionError) as error:
        raise ConfigError(f"the configuration cannot be composed: {_first_line(error)}") from error
    return dict(plain)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _below(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Every key inside an override's value."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, str(key))
        yield from _below(item, (*path, str(key)))
