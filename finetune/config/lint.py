"""Problems of keys; checks of each layer before the merge: unknown keys, code, mappings that would be lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config.fields import Plain
from finetune.config.layers import Layer, place_of
from finetune.config.schema_paths import KeyPath, dotted, takes_keys, type_at
from finetune.config.suggest import suggest_key
from finetune.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One key that cannot be used as given.

    Attributes:
        path: the key.
        what: continues a sentence that starts with the key, such as `is 0, must be at least 1`.
        fix: what to write instead, if that is known.
    """

    path: KeyPath
    what: str
    fix: str | None = None


def unknown_key(path: KeyPath) -> Problem:
    """Describe a key that the schema does not have, with the nearest one that it does have."""
    return Problem(path, "is not a key", suggest_key(path))


def raise_problems(problems: Sequence[Problem], layers: Sequence[Layer]) -> None:
    """Raise one error that names every problem with the place that set the key.

    Args:
        problems: what is wrong.
        layers: the places that set keys, in the order in which they apply.

    Raises:
        ConfigError: there is at least one problem.
    """
    if not problems:
        return
    lines = [f"{place_of(problem.path, layers)}: {dotted(problem.path)} {problem.what}" for problem in problems]
    if len(problems) == 1:
        raise ConfigError(lines[0], fix=problems[0].fix)
    with_fixes = [
        line + (f" ({problem.fix})" if problem.fix else "") for line, problem in zip(lines, problems, strict=True)
    ]
    raise ConfigError(f"{len(problems)} keys cannot be used as given\n  " + "\n  ".join(with_fixes))


def refuse_code(layer: Layer) -> None:
    """Refuse what would run code or read the environment, so that no secret gets into a written configuration.

    Raises:
        ConfigError: a `_target_` key, or `${name:...}`, which calls a resolver such as `oc.env`; also `???`, Hydra's
            mark of a missing value, which would silently keep the earlier value.
    """
    for path in layer.lines:
        if not all(map(_can_be_written, path)):
            raise ConfigError(f"{layer.place(path)}: the key {dotted(path)!r} has characters that no file can store")
        if path[-1] == "_target_":
            why = "recipes contain values; nothing in them is called"
            raise ConfigError(f"{layer.place(path)}: {dotted(path)} names code", why=why, fix="remove it")
    for path, text in _texts(layer.data, ()):
        if not _can_be_written(text):
            raise ConfigError(f"{layer.place(path)}: {dotted(path)} is {text!r}, which no file can store")
        if text == "???":
            raise ConfigError(
                f"{layer.place(path)}: {dotted(path)} is ???, which is no value", fix="write one, or null"
            )
        if _calls_resolver(text):
            why = "only other keys can be referred to, as ${data.max_length}; the environment and functions cannot"
            raise ConfigError(f"{layer.place(path)}: {dotted(path)} is {text!r}", why=why, fix="write the value itself")


def unknown_keys(layer: Layer) -> Iterator[Problem]:
    """Find the keys of a layer that the schema does not have; keys below an unknown one are not named again."""
    named = set()
    for path in layer.lines:
        depth = next((depth for depth in range(1, len(path) + 1) if type_at(path[:depth]) is None), None)
        if depth is None or path[:depth] in named or not takes_keys(type_at(path[: depth - 1])):
            continue
        named.add(path[:depth])
        yield unknown_key(path[:depth])


def lost_mappings(layers: Sequence[Layer], composed: Plain) -> Iterator[Problem]:
    """Find mappings that were meant to replace earlier ones and were merged into them.

    An empty one would be ignored silently, and one from the command line would keep sources that it does not name.

    Args:
        layers: the recipe and the command line.
        composed: the merged configuration.
    """
    for layer in layers:
        for path, value in _mappings(layer.data, ()):
            meant_whole = path in layer.lines and (value == {} or layer.is_command_line)
            got: Any = composed
            for key in path:
                got = got.get(key) if isinstance(got, Mapping) else None
            if meant_whole and isinstance(got, Mapping) and got.keys() - value.keys():
                kept = ", ".join(sorted(got.keys() - value.keys()))
                fix = "set single keys, or choose another option for the group"
                yield Problem(path, f"is merged into the earlier value, which keeps {kept}", fix)


def _can_be_written(text: str) -> bool:
    """Whether text is Unicode without NUL: half a surrogate pair cannot be encoded, NUL ends every path."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _calls_resolver(text: str) -> bool:
    """Whether a string holds `${name:...}`, however nested: a colon inside an interpolation."""
    depth = 0
    for index, character in enumerate(text):
        if text.startswith("${", index):
            depth += 1
        elif character == "}":
            depth = max(0, depth - 1)
        elif character == ":" and depth > 0:
            return True
    return False


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _texts(item, (*path, str(key)))


def _mappings(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Plain]]:
    if isinstance(value, dict):
        yield path, value
        for key, item in value.items():
            yield from _mappings(item, (*path, str(key)))
