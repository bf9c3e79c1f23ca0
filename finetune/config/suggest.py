"""Suggestions for unknown keys, words and paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.config.old_keys import RENAMED
from finetune.config.other_tools import keys_for, remark_on
from finetune.config.schema_paths import KeyPath, all_paths, children, dotted, type_at

PUBLISHED_BASES = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
TINY_HINT = "`finetune base tiny DIR` makes a small base to try things with"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_RUNS_SHOWN = 5


_IN_SECTION: dict[KeyPath, str] = dict.fromkeys((("model", "name"), ("model", "id"), ("model", "model")), "model.path")
"""Keys that other tools have in a section, where the same name elsewhere means something else."""


def suggest_key(path: KeyPath) -> str:
    """Say what an unknown key was probably meant to be.

    Args:
        path: the whole path of the key, its first unknown part anywhere in it.

    Returns:
        A sentence: what another tool's key of this name is here, else the same name elsewhere in the schema, else the
        closest path, else the keys that the section has.
    """
    if (remark := remark_on(path[-1])) is not None:
        return remark
    if (better := _IN_SECTION.get(path)) is not None:
        return f"did you mean {better}?"
    if known := [*keys_for(path[-1]), *_renamed(path[-1])]:
        return f"did you mean {' or '.join(known)}?"
    paths = list(all_paths(like=path))
    same_name = [dotted(other) for other in paths if other[-1] == path[-1]]
    if same_name:
        return f"did you mean {' or '.join(same_name[:3])}?"
    close = difflib.get_close_matches(dotted(path), [dotted(other) for other in paths], n=1, cutoff=0.7)
    if close:
        return f"did you mean {close[0]}?"
    section = next(path[:depth] for depth in range(len(path) - 1, -1, -1) if children(type_at(path[:depth])))
    where = f"keys of {dotted(section)}" if section else "top-level keys"
    return f"{where}: {', '.join(children(type_at(section)))}"


def keys_named(name: str) -> list[str]:
    """Find the keys of a name given without its sections, `trainer.epochs` for `epochs`, in other tools' words too.

    >>> keys_named("epochs"), keys_named("num_train_epochs")
    (['trainer.epochs'], ['trainer.epochs'])
    """
    found = [dotted(path) for path in all_paths() if name in (path[-1], dotted(path))]
    return found or [*keys_for(name), *_renamed(name)]


def suggest_word(given: str, words: Sequence[str]) -> str | None:
    """Find the closest of the words that would have been right, as a question; None if none is close."""
    close = difflib.get_close_matches(given, words, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None


def suggest_path(path: Path, beside: Iterable[Path]) -> str | None:
    """Find the nearest of the paths that exist beside one that does not, as a question.

    Args:
        path: the path as given.
        beside: entries of the same directory that are of the right kind.

    Returns:
        "did you mean X?", with X as one would type it, or None if none is close.
    """
    close = difflib.get_close_matches(path.name, sorted(entry.name for entry in beside), n=1)
    return f"did you mean {path.with_name(close[0])}?" if close else None


def suggest_directory(path: Path) -> str | None:
    """Find the nearest directory beside one that does not exist, as a question; None if none is close."""
    parent = path.parent
    return suggest_path(path, (entry for entry in parent.iterdir() if entry.is_dir())) if parent.is_dir() else None


def suggest_run(path: Path) -> str | None:
    """Name the run that was probably meant, else the newest runs in the directory given or beside it."""
    for directory in (path, path.parent):
        files = directory.glob("*/config.yaml") if directory.is_dir() else ()
        runs = [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime)]
        if runs:
            near = suggest_path(path, runs) if directory == path.parent else None
            return near or f"runs in {directory}: {', '.join(run.name for run in runs[-_RUNS_SHOWN:])}"
    return None


def looks_like_directory(path: str) -> bool:
    """Whether a base that does not exist here was given as a directory rather than as a repository on the hub."""
    if path in PUBLISHED_BASES:
        return False
    return path.startswith(".") or _HUB_NAME.fullmatch(path) is None or Path(path).parent.is_dir()


def suggest_base(path: str) -> str:
    """Say what to do about a base whose directory does not exist."""
    directory = Path(path).expanduser()
    if directory.name == "tiny":
        return f"make it: finetune base tiny {path}"
    if near := suggest_directory(directory):
        return near
    if near := suggest_word(directory.name, [name.partition("/")[2] for name in PUBLISHED_BASES]):
        return f"{near.replace('mean ', 'mean the hub name openai/')} {TINY_HINT}"
    return f"give a checkpoint directory or a hub name such as {PUBLISHED_BASES[0]}; {TINY_HINT}"


def _renamed(name: str) -> list[str]:
    return [dotted((*path[:-1], new)) for path, new in RENAMED.items() if path[-1] == name]
