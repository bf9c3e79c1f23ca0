"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from merging import exported as exported
from merging import merge_adapter as merge_adapter
from merging import small_base as small_base
from small_run import Train, finetune, make_workplace

from finetune.cli.main import main
from finetune.model.tiny import write_tiny_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with random embeddings (seed 0), built once. Read it; copy it before changing a file."""
    directory = tmp_path_factory.mktemp("bases") / "tiny"
    write_tiny_base(directory, seed=0, kind="random")
    return directory


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A recipe and 40 real rows with three different answers."""
    return make_workplace(tmp_path_factory.mktemp("workplace"), tiny_base)


@pytest.fixture
def train(workplace: Path, tmp_path: Path) -> Train:
    """Run the command in this process; gives its exit code and run directory."""

    def run(*overrides: str, name: str = "run") -> tuple[int, Path]:
        recipe = str(workplace / "small.yaml")
        return main(["train", recipe, f"output_dir={tmp_path}", f"name={name}", *overrides]), tmp_path / name

    return run


@pytest.fixture(scope="session")
def finished(workplace: Path) -> tuple[Path, str]:
    """A finished run of the real command, read back, and what it printed as its result."""
    arguments = [
        "train",
        workplace / "small.yaml",
        f"output_dir={workplace}",
        "name=finished",
        "export.read_back=always",
    ]
    process = finetune(*arguments, "save.every_steps=3")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return workplace / "finished", output


@pytest.fixture
def validation_losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Validation losses are taken from this list, whatever the model does."""
    from finetune.train import trainer

    losses: list[float] = []
    monkeypatch.setattr(trainer, "held_out_loss", lambda *_, **__: SimpleNamespace(mean=losses.pop(0)))
    yield losses


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens that tests make go to a directory of their own, for child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        # What DeepSpeed compiles on a CPU takes minutes and depends on versions alone: it stays where it always is.
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        patch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR", str(home / "torch_extensions")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
