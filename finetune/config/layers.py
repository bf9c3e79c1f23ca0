"""Layers of a configuration (files, command line) with the line of each key, so that an error can name its place.

YAML is read with Hydra's rules: `2e-4` is a number, a date stays text. A key given twice, an anchor or a tag is
refused, since each lets a file mean something else than it seems to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from finetune.config.fields import Plain
from finetune.config.schema_paths import KeyPath
from finetune.errors import ConfigError

COMMAND_LINE = "command line"
MOST_CHARACTERS = 2**22
_NUMBER = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's numbers and without dates."""


_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


@dataclass(frozen=True)
class Layer:
    """One place that sets keys.

    Attributes:
        label: a file's name relative to the working directory, or `command line`.
        data: the keys and values, as plain dicts, lists and scalars.
        lines: the line of each key (counted from 1), or None where there are no lines.
    """

    label: str
    data: Plain = field(default_factory=dict)
    lines: Mapping[KeyPath, int | None] = field(default_factory=dict)

    @property
    def is_command_line(self) -> bool:
        """Whether this is the command line and not a file."""
        return self.label == COMMAND_LINE

    def place(self, path: KeyPath) -> str | None:
        """Name this layer and the line that sets a key or something below it, such as `recipes/mine.yaml:12`.

        Returns:
            None if the layer does not set it.
        """
        for key, line in self.lines.items():
            if key[: len(path)] == path:
                return self.label if line is None else f"{self.label}:{line}"
        return None

    def below(self, section: str) -> Layer:
        """Move the keys below a section, as Hydra does with a group's file."""
        lines: dict[KeyPath, int | None] = {(section, *path): line for path, line in self.lines.items()}
        return Layer(self.label, {section: self.data}, {(section,): None, **lines})


def place_of(path: KeyPath, layers: Iterable[Layer]) -> str:
    """Name the place that set a key last.

    Args:
        path: the key; if nothing set it, the nearest section above it counts.
        layers: in the order in which they apply, later ones winning.
    """
    ordered = list(layers)
    for length in range(len(path), 0, -1):
        for layer in reversed(ordered):
            place = layer.place(path[:length])
            if place is not None:
                return place
    return ordered[-1].label if ordered else "configuration"


def read_yaml(path: Path) -> Layer:
    """Read a YAML file that contains one mapping.

    Raises:
        ConfigError: it cannot be read, is not YAML, is not a mapping, or has a duplicate key, an anchor or a tag.
    """
    label = display_path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise ConfigError(f"{label} has more than {MOST_CHARACTERS:,} characters, which no recipe has")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{label} cannot be read: {error}") from error
    try:
        for event in yaml.parse(text, Loader=_Loader):
            _refuse_surprises(event, label)
        root = yaml.compose(text, Loader=_Loader)
        lines: dict[KeyPath, int | None] = {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{label} is empty or not a mapping of keys to values")
        _collect_lines(root, (), lines, label)
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}" if mark else label
        raise ConfigError(f"{where} is not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # nested too deeply; a number of too many digits
        raise ConfigError(f"{label} is not valid YAML: {error}") from error
    return Layer(label, data, lines)


def display_path(path: Path) -> str:
    """Write a path relative to the working directory if it is below it, else in full."""
    full = os.path.abspath(path)
    relative = os.path.relpath(full)
    return full if relative.startswith("..") else relative


def _refuse_surprises(event: yaml.Event, label: str) -> None:
    place = f"{label}:{event.start_mark.line + 1}" if event.start_mark else label
    if isinstance(event, yaml.AliasEvent):
        raise ConfigError(f"{place} uses a YAML alias (*{event.anchor})", fix="write ${path.of.the.key} instead")
    tag = getattr(event, "tag", None)
    if tag is not None:
        raise ConfigError(f"{place} uses a YAML tag ({tag})", why="a recipe holds plain values only")


def _collect_lines(node: yaml.Node, prefix: KeyPath, lines: dict[KeyPath, int | None], label: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*prefix, str(index))] = item.start_mark.line + 1
            _collect_lines(item, (*prefix, str(index)), lines, label)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        place = f"{label}:{key.start_mark.line + 1}"
        if key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{place}: the key {key.value!r} is not text", fix=f'write it in quotes: "{key.value}"')
        path = (*prefix, key.value)
        if path in lines:
            raise ConfigError(f"{place}: {'.'.join(path)} is set twice; line {lines[path]} sets it first")
        lines[path] = key.start_mark.line + 1
        _collect_lines(value, path, lines, label)
