"""A run's directory: what lies where, and how its files are written so that a kill leaves them readable."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.config.suggest import suggest_run
from finetune.config.validate import dump_yaml, load_run_config
from finetune.errors import ConfigError, InputError, MachineError
from finetune.files import write_json, write_text
from finetune.results import Evaluation, to_json


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run's directory.

    Attributes:
        path: the directory.
        writes: False in all processes of a run but the first: what would write does nothing.
    """

    path: Path
    writes: bool = True

    @property
    def config(self) -> Path:
        """The composed configuration, as the run was started with it."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Facts about the run: base, data, checks, how it ended."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """A line a step and a line a validation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What resuming needs."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result, in PEFT's layout; there once training is done."""
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        """Figures before and after."""
        return self.path / "evaluation.json"

    @classmethod
    def create(cls, config: RunConfig, recipe_name: str) -> RunDirectory:
        """Make a new directory and write the composed configuration into it.

        Raises:
            ConfigError: the directory exists; runs are never overwritten.
            MachineError: it cannot be made.
        """
        name = config.name or f"{recipe_name.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = Path(config.output_dir) / name
        cls.refuse_existing(path)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise MachineError(
                f"cannot make the run directory {path}: {error.strerror}",
                fix="set output_dir to a place you may write to",
            ) from error
        run = cls(path)
        write_text(run.config, dump_yaml(config))
        return run

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """Raise ConfigError if there is something at `path`."""
        if path.exists():
            raise ConfigError(
                f"run directory {path} exists already",
                why="a run is never overwritten",
                fix=f"continue it with `finetune train --resume {path}`, or choose another with name=...",
            )

    @classmethod
    def open(cls, path: Path) -> tuple[RunDirectory, RunConfig]:
        """Open an existing run.

        Raises:
            InputError: not a run directory.
        """
        run = cls(path)
        if not run.config.is_file():
            raise InputError(f"{path} is not a run directory: it has no config.yaml", fix=suggest_run(path))
        return run, load_run_config(run.config)

    def read_json(self, path: Path) -> dict[str, Any]:
        """Content of one of the run's JSON files, {} if it is not there yet.

        Raises:
            InputError: it is not JSON.
        """
        if not path.exists():
            return {}
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON", why=str(error)) from error
        return content

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run: two processes in one directory would remove each other's checkpoints.

        The lock is the kernel's and ends with the process, however it ends.

        Raises:
            ConfigError: another process holds it.
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
                    f"run {self.path} is being worked on by process {file.read().strip() or 'unknown'}",
                    fix="wait for it, or stop it first",
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def remove_adapter(self) -> None:
        """Remove an adapter written before the run was resumed."""
        shutil.rmtree(self.adapter)

    def update_manifest(self, **facts: Any) -> None:
        """Add facts to manifest.json."""
        if self.writes:
            write_json(self.manifest, self.read_json(self.manifest) | facts)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Replace evaluation.json."""
        if self.writes:
            write_json(self.evaluation, to_json(evaluation))

    @contextmanager
    def discarded_if_unused(self) -> Iterator[None]:
        """Remove the directory again if the block fails before the run was under way: nothing of worth is in it."""
        try:
            yield
        except BaseException:
            if self.writes and not self.read_json(self.manifest).get("status"):
                shutil.rmtree(self.path, ignore_errors=True)
            raise


def prepare_run(config: RunConfig, recipe_name: str, overrides: Sequence[str]) -> RunDirectory:
    """Make the directory of a run whose processes are yet to start: they read its config.yaml.

    Raises:
        ConfigError: it exists already.
    """
    run = RunDirectory.create(config, recipe_name)
    run.update_manifest(recipe=recipe_name, overrides=list(overrides))
    return run
