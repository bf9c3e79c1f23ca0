"""A directory that appears whole or not at all, and that goes on where it was interrupted.

Everything is written to `.NAME.partial` beside the target and renamed at the end. Finished shards are listed in its
`progress.json` with their sha256 and what was learnt while writing them; the next attempt at the same export hashes
them again and keeps them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from finetune import log
from finetune.errors import ConfigError, MachineError
from finetune.files import sha256_of

PROGRESS = "progress.json"
_HALF = ".half"
_SPARE_BYTES = 64 << 20  # for indexes, reports and the file system's own needs


class Staging:
    """The half-written export.

    Args:
        out: the target directory; must not exist.
        key: what the export is made from; finished shards of another key are thrown away.

    Raises:
        ConfigError: `out` exists.
        MachineError: its place cannot be written to.
    """

    def __init__(self, out: Path, key: str) -> None:
        refuse_existing(out)
        self.out, self.key = out, key
        self.path = out.with_name(f".{out.name}.partial")
        self.shards: dict[str, dict[str, Any]] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"cannot make {self.path}: {error.strerror}", fix="choose another --out") from error
        self._load()

    def _load(self) -> None:
        progress = self.path / PROGRESS
        kept: dict[str, Any] = {}
        if progress.exists():
            try:
                stored = json.loads(progress.read_text())
                kept = stored["shards"] if stored["key"] == self.key else {}
            except (ValueError, KeyError, TypeError):
                log.warning(f"{progress} cannot be read: starting again")
        for name, facts in kept.items():
            if (self.path / name).is_file() and sha256_of(self.path / name) == facts["sha256"]:
                self.shards[name] = facts
            else:
                log.warning(f"{self.path / name} is not what was written: it is made again")
        for file in self.path.iterdir():
            if file.name not in self.shards and file.name != PROGRESS:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        if self.shards:
            log.info(f"going on with {self.path}: {len(self.shards)} finished files are kept")

    def require_space(self, num_bytes: int) -> None:
        """Check the disk for what is still to be written.

        Args:
            num_bytes: of the whole export.

        Raises:
            MachineError: it would not fit.
        """
        missing = num_bytes - sum((self.path / name).stat().st_size for name in self.shards) + _SPARE_BYTES
        free = shutil.disk_usage(self.path).free
        if free < missing:
            self.discard_if_empty()
            raise MachineError(
                f"{self.out} needs {missing:,} more bytes and the disk has {free:,} free",
                fix="free some space, or give --out on a larger disk",
            )

    def half(self, name: str) -> Path:
        """Where a file grows until `finish_shard` gives it its name."""
        return self.path / (name + _HALF)

    def finish_shard(self, name: str, facts: dict[str, Any]) -> None:
        """Name a file that is complete and on the disk, and remember it with its facts (`sha256` among them)."""
        os.replace(self.half(name), self.path / name)
        self.shards[name] = facts
        text = json.dumps({"key": self.key, "shards": self.shards}, indent=2) + "\n"
        half = self.half(PROGRESS)
        half.write_text(text)
        os.replace(half, self.path / PROGRESS)

    def drop_halves(self) -> None:
        """Remove what was being written when something went wrong; say what is kept."""
        for file in self.path.glob("*" + _HALF):
            file.unlink()
        if not self.discard_if_empty():
            log.info(f"finished files are kept in {self.path}: the same command goes on from there, or remove it")

    def discard_if_empty(self) -> bool:
        """Remove the directory if no shard is finished; whether it did."""
        if self.shards:
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        return True

    def publish(self) -> None:
        """Give the directory its name."""
        (self.path / PROGRESS).unlink(missing_ok=True)
        refuse_existing(self.out)
        os.rename(self.path, self.out)


def refuse_existing(out: Path) -> None:
    """Raise ConfigError if there is something at `out`."""
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{out} exists already",
            why="an export never overwrites anything",
            fix="give another --out, or remove it first",
        )
