"""Types and ranges that the schema gives to dotted keys, the keys of each section, and descriptions in words."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from finetune.config.fields import BOUNDS, describe_range
from finetune.config.schema import RunConfig

KeyPath = tuple[str, ...]

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def dotted(path: KeyPath) -> str:
    """Write a path as on the command line: `("trainer", "epochs")` is `trainer.epochs`."""
    return ".".join(path)


def section_classes(kind: Any) -> tuple[type, ...]:
    """List the dataclasses of a section: one, or one per `kind` where the section is a tagged union.

    Returns:
        Nothing for a value and for a mapping with free names.
    """
    if dataclasses.is_dataclass(kind):
        return (kind,)  # type: ignore[return-value]
    parts = _union_members(kind)
    return parts if parts and all(map(dataclasses.is_dataclass, parts)) else ()


def section_tags(section: type) -> tuple[str, ...]:
    """List the values of `kind` that choose a class of a tagged union; empty for any other section."""
    return tuple(get_args(get_type_hints(section).get("kind")))


@functools.cache
def children(kind: Any) -> Mapping[str, Any]:
    """Map the keys below a section to their types; a tagged union has the keys of all its classes.

    Returns:
        Nothing for a value and for a mapping with free names.
    """
    found: dict[str, Any] = {}
    for section in section_classes(kind):
        hints = get_type_hints(section)
        for field in dataclasses.fields(section):
            found[field.name] = _either(found.get(field.name, hints[field.name]), hints[field.name])
    return found


def type_at(path: KeyPath, root: Any = RunConfig) -> Any | None:
    """Find the type that the schema gives to a path.

    Args:
        path: keys from the top; below `data.train` and the like any name is a source's name.
        root: the schema's top section.

    Returns:
        The annotation without its range, or None if there is no such key.
    """
    kind: Any = root
    for key in path:
        if key.isdigit() and get_origin(kind) is types.UnionType:  # a list or null: its items are the list's
            kind = next(part for part in get_args(kind) if part is not types.NoneType)
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif get_origin(kind) is tuple and key.isdigit():
            kind = get_args(kind)[0]
        elif key in children(kind):
            kind = children(kind)[key]
        else:
            return None
    return kind


def range_at(path: KeyPath, root: Any = RunConfig) -> str | None:
    """Describe the range of a number, such as `at least 1`; None where the schema gives it none."""
    for section in section_classes(type_at(path[:-1], root)):
        hint = get_type_hints(section, include_extras=True).get(path[-1])
        for part in (hint, *get_args(hint)):
            bounds = [each for each in getattr(part, "__metadata__", ()) if isinstance(each, BOUNDS)]
            if bounds:
                return describe_range(bounds)
    return None


def all_paths(kind: Any = RunConfig, prefix: KeyPath = (), like: KeyPath = ()) -> Iterator[KeyPath]:
    """Walk every section and key below `kind`; free names are taken from `like` where it has one, else written NAME."""
    below = children(kind)
    if get_origin(kind) is dict and children(get_args(kind)[1]):
        name = like[len(prefix)] if like[: len(prefix)] == prefix and len(like) > len(prefix) else "NAME"
        below = {name: get_args(kind)[1]}
    for key, child in below.items():
        yield (*prefix, key)
        yield from all_paths(child, (*prefix, key), like)


def takes_keys(kind: Any) -> bool:
    """Whether a key of this type has keys below it."""
    return get_origin(kind) is dict or bool(children(kind))


def allowed_words(kind: Any) -> tuple[str, ...]:
    """Words that a `Literal` key (or the items of a list of them) takes; empty for any other type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for part in get_args(kind) for word in allowed_words(part))


def describe(kind: Any) -> str:
    """Say in words what a key of this type takes, such as `a whole number or null`."""
    origin, parts = get_origin(kind), get_args(kind)
    if children(kind):
        return "a mapping with keys " + ", ".join(children(kind))
    if origin is Literal:
        return "one of " + ", ".join(parts) if len(parts) > 1 else f"only {parts[0]}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else describe(part) for part in parts)
    if origin is tuple:
        items = "a list" if parts[-1] is Ellipsis else f"a list of {len(parts)}"
        return f"{items}, each {describe(parts[0])}"
    if origin is dict:
        return f"a mapping from names to {describe(parts[1])}"
    return _WORDS[kind]


def _union_members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()


def _either(one: Any, other: Any) -> Any:
    """The type of a key that two classes of a tagged union have; words of both where it takes words."""
    if one == other:
        return one
    if get_origin(one) is get_origin(other) is Literal:
        return Literal[(*get_args(one), *get_args(other))]
    return one | other
