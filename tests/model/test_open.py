"""Opening a base: one function for every command, which honours storage formats, kernels and recorded identities."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Train

import finetune
from finetune.cli.main import main
from finetune.config.schema import ModelConfig
from finetune.errors import InputError, MachineError
from finetune.model.attention import attention_kernel
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import expert_kernel
from finetune.model.open import open_base
from finetune.model.storage import storage_table

pytestmark = pytest.mark.usefixtures("one_thread")

PACKAGE = Path(finetune.__file__).parent
NF4 = ("model.expert_storage=nf4", "model.attention_storage=nf4", "model.embedding_on_cpu=true")


def formats(config: ModelConfig) -> dict[str, str]:
    return {line.part: line.format for line in storage_table(open_base(config).model)}


def test_storage_kernels_and_dtype_are_those_of_the_recipe(tiny_base: Path) -> None:
    config = ModelConfig(path=str(tiny_base), device="cpu", compute_dtype="bfloat16")
    base = open_base(replace(config, expert_storage="bfloat16", attention_kernel="reference", experts_per_chunk=3))
    assert base.compute_dtype == torch.bfloat16 and base.device.type == "cpu"
    assert expert_kernel(base.model) == attention_kernel(base.model) == "reference"
    assert base.model.model.layers[0].mlp.experts.experts_per_chunk == 3
    assert base.storage.experts == "bfloat16" and not base.model.training
    assert attention_kernel(open_base(config).model) == "flash"
    assert formats(config)["expert weights"] == "mxfp4"
    nf4 = formats(replace(config, expert_storage="nf4", attention_storage="nf4"))
    assert nf4["expert weights"] == nf4["attention weights"] == "nf4"
    with pytest.raises(MachineError, match="expert_kernel is triton, but no CUDA device"):
        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernel is there")
        open_base(replace(config, expert_kernel="triton"))


def test_another_base_than_the_recorded_one_is_refused(tiny_base: Path) -> None:
    config = ModelConfig(path=str(tiny_base), device="cpu")
    identity = open_base(config).identity
    assert open_base(replace(config, identity=identity[:12])).identity == identity
    with pytest.raises(InputError, match=r"model\.identity says 0123"):
        open_base(replace(config, identity="0123"))


def test_files_are_verified_unless_the_caller_or_the_recipe_says_otherwise(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("changed")
    config = ModelConfig(path=str(tmp_path), device="cpu")
    with pytest.raises(InputError, match=r"README\.md does not have the sha256"):
        open_base(config)
    open_base(replace(config, verify_checksums=False))
    assert "checksums not compared" in capsys.readouterr().err
    open_base(config, verify_files=False, quiet=True, checkpoint=Checkpoint.open(tmp_path))
    assert "base: " not in capsys.readouterr().err


def scores(workplace: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """The file that `finetune experts score` writes."""
    command = ["experts", "score", str(workplace / "small.yaml"), *overrides, "--select", "top_k=2", "--out", str(out)]
    assert main(command) == 0
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_experts_are_scored_on_the_base_that_a_run_trains(workplace: Path, train: Train, tmp_path: Path) -> None:
    """The command once opened the base with default storage and kernels, whatever the recipe said."""
    native = scores(workplace, tmp_path / "mxfp4.json")
    nf4 = scores(workplace, tmp_path / "nf4.json", *NF4)
    assert nf4["gate"] != native["gate"], "control: NF4 is another function"
    for overrides, wanted in (((), native), (NF4, nf4)):
        code, run = train(
            *overrides, "adapter.experts.select=top_k=2", "trainer.max_steps=1", name=f"run{len(overrides)}"
        )
        assert code == 0
        chosen = json.loads((run / "experts.json").read_text())
        assert chosen["gate"] == wanted["gate"] and chosen["selected"] == wanted["selected"]


def test_no_other_module_builds_a_base() -> None:
    """Other ways of building a base would ignore settings of the recipe, as five did."""
    found = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "build_base" in path.read_text()]
    assert sorted(found) == ["model/build.py", "model/open.py"]


def test_device_and_dtype_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.errors import ConfigError
    from finetune.model.open import choose_device, choose_dtype

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="torch finds no GPU"):
        choose_device(ModelConfig(path="x", device="cuda"))
    with pytest.raises(ConfigError, match="float32 on a GPU"):
        choose_dtype(ModelConfig(path="x", compute_dtype="float32"), torch.device("cuda"))


def test_importing_it_loads_no_command_or_trainer() -> None:
    code = "import sys, finetune.model.open; print(sorted(m for m in sys.modules if m.startswith('finetune.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "finetune.train" not in done.stdout and "finetune.adapters" not in done.stdout
