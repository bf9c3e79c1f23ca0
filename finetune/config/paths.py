"""Paths: what ships with the toolkit (in a checkout and in a wheel), and the meaning of a recipe's data paths."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Literal

from finetune.errors import InputError, MachineError

SHIPPED_PREFIX = "shipped://"
HUB_PREFIX = "hub://"
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
    if found.exists():
        return [found]
    return sorted(Path(name) for name in glob.glob(str(found), recursive=True)) if is_glob(path) else []


def prepared_dir() -> Path:
    """Directory of data sets built by `finetune data prepare`: below $XDG_DATA_HOME, else below ~/.local/share."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "gpt-oss-finetune"


def cache_dir(setting: str | None) -> Path:
    """Directory of the token cache: the recipe's `data.cache_dir`, else below $XDG_CACHE_HOME, else below ~/.cache."""
    if setting is not None:
        return Path(setting).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-oss-finetune"
