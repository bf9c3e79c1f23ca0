"""Paths: what ships with the toolkit (in a checkout and in a wheel), and the meaning of a recipe's data paths."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from finetune.errors import InputError, MachineError

SHIPPED_PREFIX = "shipped://"
HUB_PREFIX = "hub://"
MOST_DIRECTORIES, MOST_ENTRIES = 20_000, 1_000_000
"""A pattern that leads through more of them is refused: it was not meant to search a whole disk."""
_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_dir(name: Literal["configs", "recipes", "data"]) -> Path:
    """Find a folder that ships with the toolkit.

    Args:
        name: the folder. A wheel has it in `finetune/_shipped/`, a checkout (or an editable install) beside the
            package.

    Raises:
        MachineError: neither place has it, so the installation is broken.
    """
    for folder in (_PACKAGE / "_shipped" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise MachineError(
        f"the toolkit's own {name}/ folder is missing (looked beside and inside {_PACKAGE})",
        fix="reinstall gpt-oss-finetune",
    )


def resolve_data_path(path: str) -> Path:
    """Turn a recipe's data path into a file path, which need not exist.

    Args:
        path: `shipped://FOLDER/FILE` is the toolkit's own `data/FOLDER/FILE`, or the output of `finetune data prepare`
            for a file that this installation lacks; anything else is a path, relative to the working directory,
            with `~` as the home directory.

    Raises:
        InputError: a `shipped://` path that leaves the toolkit's data folder.
    """
    if not path.startswith(SHIPPED_PREFIX):
        return Path(path).expanduser()
    root = shipped_dir("data")
    inside = root / path.removeprefix(SHIPPED_PREFIX)
    if not inside.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path} points outside the toolkit's data folder", fix="give the file's own path")
    prepared = prepared_dir() / path.removeprefix(SHIPPED_PREFIX)
    return prepared if prepared.is_file() and not inside.exists() else inside


def fix_for_missing_data(path: str) -> str | None:
    """Say what to do about a missing `shipped://` file that packages may not contain; None for any other."""
    if not path.startswith(f"{SHIPPED_PREFIX}medical/"):
        return None
    if path == f"{SHIPPED_PREFIX}medical/pubmedqa_pairs.jsonl.gz":
        return "an installed package has no medical pairs: use a checkout, which has the file, or data=legal_pairs"
    return "an installed package has no medical abstracts: `finetune data prepare medical` builds them"


def is_glob(path: str) -> bool:
    """Whether a recipe's data path is a pattern: it has `*`, `?` or `[` and no file has that name."""
    return glob.has_magic(path) and not path.startswith(HUB_PREFIX) and not resolve_data_path(path).exists()


def matching_files(path: str) -> list[Path]:
    """Find the files and directories that a recipe's data path names.

    Args:
        path: as in `resolve_data_path`; `*`, `?`, `[...]` and `**` match as in a shell.

    Returns:
        Existing paths, sorted by name; none for a hub name and if nothing matches.
    """
    if path.startswith(HUB_PREFIX):
        return []
    found = resolve_data_path(path)
    try:
        if found.exists():
            return [found]
    except OSError as error:  # a name that is too long, a directory that may not be read
        raise InputError(f"the path {path[:200]} cannot be looked up", why=str(error.strerror)) from None
    return _Pattern(path, found).matches() if is_glob(path) else []


class _Pattern:
    """A pattern of paths, matched as `glob.glob(..., recursive=True)` matches it, but over a bounded number of entries.

    Args:
        written: the pattern as the recipe has it, for the message.
        path: the same as a path.
    """

    def __init__(self, written: str, path: Path) -> None:
        self._written, self._path = written, path
        self._num_directories = self._num_entries = 0

    def matches(self) -> list[Path]:
        """All that matches, sorted by name.

        Raises:
            InputError: the pattern leads through more directories or entries than data has.
        """
        root = Path(self._path.anchor)
        parts = self._path.parts[1:] if self._path.anchor else self._path.parts
        return sorted(set(self._below(root, parts, ())))

    def _below(self, directory: Path, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
        part, rest = parts[0], parts[1:]
        if not glob.has_magic(part):
            if not rest:
                yield from [directory / part] if os.path.lexists(directory / part) else []
            elif (directory / part).is_dir():
                yield from self._below(directory / part, rest, ())
            return
        if part != "**":
            for entry in self._entries(directory):
                hidden = entry.name.startswith(".") and not part.startswith(".")
                if not hidden and fnmatch.fnmatchcase(entry.name, part):
                    if not rest:
                        yield directory / entry.name
                    elif _is_directory(entry):
                        yield from self._below(directory / entry.name, rest, ())
            return
        if rest:
            yield from self._below(directory, rest, ())
        try:
            status = os.stat(directory)
        except OSError:
            return
        if (status.st_dev, status.st_ino) in above:  # a link to a directory above it
            return
        for entry in self._entries(directory):
            if not entry.name.startswith("."):
                if not rest:
                    yield directory / entry.name
                if _is_directory(entry):
                    yield from self._below(directory / entry.name, parts, (*above, (status.st_dev, status.st_ino)))

    def _entries(self, directory: Path) -> list[os.DirEntry[str]]:
        """A directory's entries; none if it may not be read, as a shell has it."""
        self._num_directories += 1
        try:
            with os.scandir(directory) as scanned:
                found = list(islice(scanned, MOST_ENTRIES + 1))
        except OSError:
            return []
        self._num_entries += len(found)
        if self._num_directories > MOST_DIRECTORIES or self._num_entries > MOST_ENTRIES:
            raise InputError(
                f"the pattern {self._written} leads through more than {MOST_DIRECTORIES:,} directories or "
                f"{MOST_ENTRIES:,} entries",
                why=f"it has come to {directory}",
                fix="begin it with the directory of the data, and write ** only where folders differ in depth",
            )
        return found


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def refuse_special_file(place: str, path: Path) -> None:
    """Refuse what is neither a file nor a directory, before it is opened: reading it may never end.

    Args:
        place: what names the file, for the message.
        path: an existing path, or a link.

    Raises:
        InputError: a device, pipe, socket, or a link to nothing.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = "is a link to nothing" if path.is_symlink() else f"cannot be looked up: {error.strerror}"
        raise InputError(f"{place} {path} {what}", fix="give a file that is there") from None
    if stat.S_ISREG(mode) and path.resolve().parts[1] in ("proc", "sys"):
        raise InputError(f"{place} {path} is a file of the kernel, and no data", fix="give a file of records")
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    kinds = {
        stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a block device",
    }  # fmt: skip
    raise InputError(
        f"{place} {path} is {kinds.get(stat.S_IFMT(mode), 'a special file')}, not a file",
        why="data is read more than once and from its beginning, and this may have no end",
        fix="write the records into a file first",
    )


def prepared_dir() -> Path:
    """Directory of data sets built by `finetune data prepare`: below $XDG_DATA_HOME, else below ~/.local/share."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "gpt-oss-finetune"


def cache_dir(setting: str | None) -> Path:
    """Directory of the token cache: the recipe's `data.cache_dir`, else below $XDG_CACHE_HOME, else below ~/.cache."""
    if setting is not None:
        return Path(setting).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-oss-finetune"
