"""What a path that is not there was probably meant to be: a name near it, a run beside it, or a name on the hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from finetune.config.keys import suggest_word

PUBLISHED_BASES = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TINY_HINT = "`finetune base tiny DIR` makes a small base to try things with"
_RUNS_SHOWN = 5


def near_path(path: Path, beside: Iterable[Path]) -> str | None:
    """Ask for the nearest of the paths that exist beside one that does not.

    Args:
        path: what was given.
        beside: entries of the same directory that would do.

    Returns:
        "did you mean X?", with X as one would type it, or None if none is close.
    """
    close = difflib.get_close_matches(path.name, sorted(entry.name for entry in beside), n=1)
    return f"did you mean {path.with_name(close[0])}?" if close else None


def near_directory(path: Path) -> str | None:
    """Ask for the nearest directory beside one that does not exist; None if there is none."""
    parent = path.parent
    return near_path(path, (entry for entry in parent.iterdir() if entry.is_dir())) if parent.is_dir() else None


def near_runs(path: Path) -> str | None:
    """Name the run that was probably meant, else the newest ones in the directory given or beside it."""
    for directory in (path, path.parent):
        files = directory.glob("*/config.yaml") if directory.is_dir() else ()
        runs = [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime)]
        if runs:
            near = near_path(path, runs) if directory == path.parent else None
            return near or f"runs in {directory}: {', '.join(run.name for run in runs[-_RUNS_SHOWN:])}"
    return None


def means_directory(path: str) -> bool:
    """Whether a base that does not exist here was given as a directory, and not as a repository on the hub."""
    if path in PUBLISHED_BASES:
        return False
    return path.startswith(".") or _HUB_NAME.fullmatch(path) is None or Path(path).parent.is_dir()


def base_fix(path: str) -> str:
    """What to do about a base whose directory does not exist."""
    directory = Path(path).expanduser()
    if directory.name == "tiny":
        return f"make it: finetune base tiny {path}"
    if near := near_directory(directory):
        return near
    if near := suggest_word(directory.name, [name.partition("/")[2] for name in PUBLISHED_BASES]):
        return f"{near.replace('mean ', 'mean the hub name openai/')} {TINY_HINT}"
    return f"give a checkpoint directory or a hub name such as {PUBLISHED_BASES[0]}; {TINY_HINT}"
