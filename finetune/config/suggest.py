"""What keys the schema has: their types in words, and the nearest one to a key that it does not have."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from finetune.config.schema import RunConfig

KeyPath = tuple[str, ...]

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def dotted(path: KeyPath) -> str:
    """Write a path as it stands on the command line: `("trainer", "epochs")` is `trainer.epochs`."""
    return ".".join(path)


@functools.cache
def children(kind: Any) -> Mapping[str, Any]:
    """Keys below a section of the schema, with their types; none for a value or a mapping with free names."""
    if not dataclasses.is_dataclass(kind):
        return {}
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def type_at(path: KeyPath) -> Any | None:
    """Find the type that the schema gives to a path.

    Args:
        path: keys from the top; below `data.train` and the like any name is a source's name.

    Returns:
        The annotation, or None if there is no such key.
    """
    kind: Any = RunConfig
    for key in path:
        if get_origin(kind) is types.UnionType and key.isdigit():  # a list or null: its items are the list's
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


def takes_keys(kind: Any) -> bool:
    """Whether keys can stand below a key of this type."""
    return get_origin(kind) is dict or bool(children(kind))


def allowed_words(kind: Any) -> tuple[str, ...]:
    """Words that a `Literal` key (or the items of a list of them) takes; empty for any other type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for part in get_args(kind) for word in allowed_words(part))


def describe(kind: Any) -> str:
    """Say in words what a key of this type takes, such as `a whole number or null`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(parts) if len(parts) > 1 else f"only {parts[0]}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else describe(part) for part in parts)
    if origin is tuple:
        items = "a list" if parts[-1] is Ellipsis else f"a list of {len(parts)}"
        return f"{items}, each {describe(parts[0])}"
    if origin is dict:
        return f"a mapping from names to {describe(parts[1])}"
    if children(kind):
        return "a mapping with keys " + ", ".join(children(kind))
    return _WORDS[kind]


def suggest(path: KeyPath) -> str:
    """Say what an unknown key was probably meant to be.

    Args:
        path: the whole path of the key, its first unknown part anywhere in it.

    Returns:
        A sentence: the same name elsewhere in the schema, else the closest path, else the keys that the section has.
    """
    known = list(_all_paths(RunConfig, (), path))
    same_name = [dotted(other) for other in known if other[-1] == path[-1]]
    if same_name:
        return f"did you mean {' or '.join(same_name[:3])}?"
    close = difflib.get_close_matches(dotted(path), [dotted(other) for other in known], n=1, cutoff=0.7)
    if close:
        return f"did you mean {close[0]}?"
    section = next(path[:depth] for depth in range(len(path) - 1, -1, -1) if children(type_at(path[:depth])))
    where = f"keys of {dotted(section)}" if section else "top-level keys"
    return f"{where}: {', '.join(children(type_at(section)))}"


def key_named(name: str) -> str | None:
    """Find the key of a name given without its sections, such as `trainer.epochs` for `epochs`; None unless one has it.

    >>> key_named("epochs")
    'trainer.epochs'
    """
    found = [dotted(path) for path in _all_paths(RunConfig, (), ()) if name in (path[-1], dotted(path))]
    return found[0] if len(found) == 1 else None


def suggest_word(given: str, words: list[str] | tuple[str, ...]) -> str | None:
    """Find the closest of the words that would have been right, as a question; None if none is close."""
    close = difflib.get_close_matches(given, words, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None


def _all_paths(kind: Any, prefix: KeyPath, like: KeyPath) -> Iterator[KeyPath]:
    """Every section and key below `kind`; free names are taken from `like` where it has one, else written NAME."""
    below = children(kind)
    if get_origin(kind) is dict and children(get_args(kind)[1]):
        name = like[len(prefix)] if like[: len(prefix)] == prefix and len(like) > len(prefix) else "NAME"
        below = {name: get_args(kind)[1]}
    for key, child in below.items():
        yield (*prefix, key)
        yield from _all_paths(child, (*prefix, key), like)


# What a path that is not there was probably meant to be: a name near it, a run beside it, or a name on the hub.

PUBLISHED_BASES = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TINY_HINT = "`finetune base tiny DIR` makes a small base to try things with"
_RUNS_SHOWN = 5


def suggest_path(path: Path, beside: Iterable[Path]) -> str | None:
    """Ask for the nearest of the paths that exist beside one that does not.

    Args:
        path: what was given.
        beside: entries of the same directory that would do.

    Returns:
        "did you mean X?", with X as one would type it, or None if none is close.
    """
    close = difflib.get_close_matches(path.name, sorted(entry.name for entry in beside), n=1)
    return f"did you mean {path.with_name(close[0])}?" if close else None


def suggest_directory(path: Path) -> str | None:
    """Ask for the nearest directory beside one that does not exist; None if there is none."""
    parent = path.parent
    return suggest_path(path, (entry for entry in parent.iterdir() if entry.is_dir())) if parent.is_dir() else None


def suggest_run(path: Path) -> str | None:
    """Name the run that was probably meant, else the newest ones in the directory given or beside it."""
    for directory in (path, path.parent):
        files = directory.glob("*/config.yaml") if directory.is_dir() else ()
        runs = [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime)]
        if runs:
            near = suggest_path(path, runs) if directory == path.parent else None
            return near or f"runs in {directory}: {', '.join(run.name for run in runs[-_RUNS_SHOWN:])}"
    return None


def looks_like_directory(path: str) -> bool:
    """Whether a base that does not exist here was given as a directory, and not as a repository on the hub."""
    if path in PUBLISHED_BASES:
        return False
    return path.startswith(".") or _HUB_NAME.fullmatch(path) is None or Path(path).parent.is_dir()


def suggest_base(path: str) -> str:
    """What to do about a base whose directory does not exist."""
    directory = Path(path).expanduser()
    if directory.name == "tiny":
        return f"make it: finetune base tiny {path}"
    if near := suggest_directory(directory):
        return near
    if near := suggest_word(directory.name, [name.partition("/")[2] for name in PUBLISHED_BASES]):
        return f"{near.replace('mean ', 'mean the hub name openai/')} {TINY_HINT}"
    return f"give a checkpoint directory or a hub name such as {PUBLISHED_BASES[0]}; {TINY_HINT}"
