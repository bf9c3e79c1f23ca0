"""A directory that is written file by file and survives an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from finetune import log
from finetune.errors import MachineError
from finetune.files import PARTIAL, fix_for, refuse_existing, sha256_of, write_json

PROGRESS = "progress.json"
_UNFINISHED = ".half"
_SPARE_BYTES = 64 << 20  # for indexes, reports and the file system's own needs


class ResumableDirectory:
    """A directory that is written file by file, survives an interruption, and gets its name when it is complete.

    Files are written to `.NAME.partial` beside the target. Finished ones are listed in its `progress.json` with a
    record that has their SHA-256; the next attempt with the same key hashes them again and keeps them.

    Args:
        out: the target directory; must not exist.
        key: what the content is made from; finished files of another key are removed.

    Attributes:
        path: the unfinished directory.
        files: the record of each finished file.

    Raises:
        ConfigError: `out` exists.
        MachineError: the unfinished directory cannot be made.
    """

    def __init__(self, out: Path, key: str) -> None:
        refuse_existing(out)
        self.out, self.key = out, key
        self.path = out.with_name(f".{out.name}{PARTIAL}")
        self.files: dict[str, dict[str, Any]] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = fix_for(error, "choose another --out")
            raise MachineError(f"cannot make {self.path}: {error.strerror}", fix=fix) from error
        self._load()

    def _load(self) -> None:
        progress = self.path / PROGRESS
        kept: dict[str, Any] = {}
        if progress.exists():
            try:
                stored = json.loads(progress.read_text())
                shards = stored["shards"]
                hashes = [record["sha256"] for record in shards.values()]
                if not all(isinstance(each, str) for each in hashes) or stored.get("sha256") not in (
                    None,
                    _digest(shards),
                ):
                    raise ValueError("changed since it was written")
                kept = shards if stored["key"] == self.key else {}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                log.warning(f"{progress} cannot be read, or was changed: starting again")
        for name, record in kept.items():
            path = self.path / name
            if path.parent == self.path and path.is_file() and sha256_of(path) == record["sha256"]:
                self.files[name] = record
            else:
                log.warning(f"{self.path / name} was modified or removed: it is written again")
        for file in self.path.iterdir():
            if file.name not in self.files and file.name != PROGRESS:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        if self.files:
            log.info(f"continuing with {self.path}: {len(self.files)} finished files are kept")

    def require_space(self, num_bytes: int) -> None:
        """Check that the disk has room for everything that is still to be written.

        Args:
            num_bytes: of the complete directory.

        Raises:
            MachineError: it would not fit.
        """
        missing = num_bytes - sum((self.path / name).stat().st_size for name in self.files) + _SPARE_BYTES
        free = shutil.disk_usage(self.path).free
        if free < missing:
            self.discard_if_empty()
            raise MachineError(
                f"{self.out} needs {missing:,} more bytes and the disk has {free:,} free",
                fix="free some space, or give --out on a larger disk",
            )

    def unfinished(self, name: str) -> Path:
        """The path to write a file to until `finish` gives it its name."""
        return self.path / (name + _UNFINISHED)

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Name a file that is complete and on the disk, and list it with its record (`sha256` and more)."""
        os.replace(self.unfinished(name), self.path / name)
        self.files[name] = record
        write_json(self.path / PROGRESS, {"key": self.key, "shards": self.files, "sha256": _digest(self.files)})

    def remove_unfinished(self) -> None:
        """Remove files that were being written when something failed; the finished ones are kept."""
        for file in self.path.glob("*" + _UNFINISHED):
            file.unlink()
        if not self.discard_if_empty():
            log.info(f"finished files are kept in {self.path}: repeat the command to continue, or remove it")

    def discard_if_empty(self) -> bool:
        """Remove the directory if no file is finished; returns whether it did."""
        if self.files:
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        return True

    def publish(self) -> None:
        """Give the directory its name."""
        (self.path / PROGRESS).unlink(missing_ok=True)
        refuse_existing(self.out)
        os.rename(self.path, self.out)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
