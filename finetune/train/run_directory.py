"""The directory of a run: its files, how it is created, opened, locked and updated.

Imports no torch, so that commands that only look at a run start at once.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import log
from finetune.adapters.config_file import UNVERIFIED
from finetune.config.derive import absolute_paths
from finetune.config.differences import differences
from finetune.config.schema import RunConfig
from finetune.config.suggest import suggest_run
from finetune.config.validate import dump_yaml, load_run_config, to_plain
from finetune.errors import ConfigError, InputError, MachineError
from finetune.files import fix_for, write_json, write_text
from finetune.manifest import read_manifest
from finetune.results import Evaluation, write_evaluation

_LOCKS: dict[Path, int] = {}  # inode of the lock file of each run that this process has locked


@dataclass(frozen=True)
class Run:
    """A run: its directory and its recipe.

    Attributes:
        path: the directory.
        config: the recipe.
        writes: False on all ranks but rank 0: every method that would write does nothing.
    """

    path: Path
    config: RunConfig
    writes: bool = True

    @property
    def config_file(self) -> Path:
        """The recipe as composed, with absolute paths."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """JSON record of the run: base, data, checks, how it ended."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One line per step and per validation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints for resuming."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's layout; there when training is done and the adapter is verified."""
        return self.path / "adapter"

    @property
    def unverified_adapter(self) -> Path:
        """The trained adapter until it has passed the read-back; it stays under this name if it does not."""
        return self.path / UNVERIFIED

    @property
    def evaluation(self) -> Path:
        """Test scores before and after training."""
        return self.path / "evaluation.json"

    @property
    def expert_scores(self) -> Path:
        """Path of the list of adapted experts; missing if all are."""
        return self.path / "experts.json"

    @classmethod
    def create(cls, config: RunConfig, recipe_name: str, overrides: Sequence[str]) -> Run:
        """Make a new directory with config.yaml and the first lines of manifest.json.

        Args:
            config: the recipe. Its relative paths are stored as absolute ones: a resumed run may start elsewhere.
            recipe_name: names the directory where the recipe does not.
            overrides: of the command line, for the record.

        Raises:
            ConfigError: the directory exists; runs are never overwritten.
            MachineError: it cannot be made.
        """
        name = config.name or f"{recipe_name.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = Path(config.output_dir) / name
        cls.check_new(path)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise MachineError(
                f"cannot make the run directory {path}: {error.strerror}",
                fix=fix_for(error, "set output_dir to a place you may write to"),
            ) from error
        run = cls(path, config)
        stored = absolute_paths(config, Path.cwd())
        write_text(run.config_file, dump_yaml(stored))
        run.update_manifest(recipe=recipe_name, overrides=list(overrides), config=to_plain(stored))
        return run

    @staticmethod
    def check_new(path: Path) -> None:
        """Raise ConfigError if something exists at `path`."""
        if path.exists():
            raise ConfigError(
                f"run directory {path} exists already",
                why="a run is never overwritten",
                fix=f"continue it with `finetune train --resume {path}`, or choose another with name=...",
            )

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open an existing run.

        Raises:
            InputError: not a run directory.
        """
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path} is not a run directory: it has no config.yaml", fix=suggest_run(path))
        return cls(path, load_run_config(path / "config.yaml"))

    def check_unedited(self) -> None:
        """Refuse to go on with a config.yaml that is not what the run began with, but for places and trackers.

        manifest.json has the configuration once more; runs of 0.1 have not, and pass.

        Raises:
            ConfigError: names the keys that were changed, with both values.
        """
        began = self.read_manifest().get("config")
        if not isinstance(began, dict):
            return
        changed = differences(began, to_plain(self.config))
        for difference in changed:
            if _may_change(difference.key):
                log.info(f"config.yaml was edited since the run began: {difference.describe()}")
        if others := [difference.describe() for difference in changed if not _may_change(difference.key)]:
            raise ConfigError(
                f"{self.config_file} was edited since the run began: {'; '.join(others)}",
                why="the rest of the run would be trained otherwise than its beginning",
                fix="undo the change, or start a new run with it",
            )

    @property
    def status(self) -> str | None:
        """`running`, `stopped` or `finished`; None before training has begun."""
        return self.read_manifest().get("status")

    def read_manifest(self) -> dict[str, Any]:
        """Content of manifest.json, {} if there is none yet.

        Raises:
            InputError: it is not a manifest, see `finetune.manifest.read_manifest`.
        """
        return read_manifest(self.path)

    def update_manifest(self, **entries: Any) -> None:
        """Add entries to manifest.json."""
        if self.writes:
            self.check_in_place()
            write_json(self.manifest, self.read_manifest() | entries)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Replace evaluation.json."""
        if self.writes:
            write_evaluation(self.evaluation, evaluation)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run: two processes in one directory would remove each other's checkpoints.

        The lock is the kernel's and ends with the process, however it ends.

        Raises:
            ConfigError: another process has locked it.
        """
        if not self.writes:
            yield
            return
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ConfigError(
                    f"run {self.path} is in use by process {file.read().strip() or 'unknown'}",
                    fix="wait for it, or stop it first",
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            _LOCKS[self.path] = os.fstat(file.fileno()).st_ino
            try:
                yield
            finally:
                del _LOCKS[self.path]

    def check_in_place(self) -> None:
        """Raise MachineError if the directory that this process has locked was moved or removed."""
        if self.path not in _LOCKS:
            return
        try:
            is_ours = (self.path / ".lock").stat().st_ino == _LOCKS[self.path]
        except OSError:
            is_ours = False
        if not is_ours:
            raise MachineError(
                f"the run directory {self.path} was moved or removed while the run was going on",
                why="what it writes from here on would be in another place than what it has written",
                fix="move it back and continue with `finetune train --resume`, or start again",
            )

    @contextmanager
    def discarded_if_unused(self) -> Iterator[None]:
        """Remove the directory if the block fails before training has begun: it holds no result."""
        try:
            yield
        except BaseException:
            if self.writes and not self.status and not any((self.path / "logs").glob("*")):  # messages name the logs
                shutil.rmtree(self.path, ignore_errors=True)
            raise


def _may_change(key: str) -> bool:
    """Whether a stopped run's config.yaml may have another value: a place, or what does not touch the training."""
    return key in ("name", "output_dir", "data.cache_dir") or key.endswith(".path") or key.startswith("logging.")
