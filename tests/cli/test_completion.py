"""Completion of the end of a line, in Python and through the real bash function."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.completion import SCRIPTS, candidates
from finetune.cli.main import COMMANDS


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("finetune tr", ["train"]),
        ("finetune train quick", ["quickstart"]),
        ("finetune train quickstart trainer.sched", ["trainer.schedule="]),
        ("finetune train quickstart trainer.schedule=c", ["trainer.schedule=constant", "trainer.schedule=cosine"]),
        ("finetune train quickstart trainer.activation_checkpointing=t", ["trainer.activation_checkpointing=true"]),
        ("finetune train quickstart model=ti", ["model=tiny"]),
        ("finetune train quickstart data.train.mine.pa", ["data.train.mine.path="]),
        ("finetune train quickstart --dr", ["--dry-run"]),
        ("finetune config sh", ["show"]),
        ("finetune config show quick", ["quickstart"]),
        ("finetune export runs/x --to gguf-", ["gguf-lora"]),
        ("finetune generate runs/x hi --which b", ["base", "both"]),
        ("finetune nonsense ", []),
        ("finetune train quickstart no.such.key", []),
    ],
)  # fmt: skip
def test_candidates(line: str, wanted: list[str]) -> None:
    assert candidates(line) == wanted


def test_all_commands_and_runs_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert candidates("finetune ") == list(COMMANDS)
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
    assert candidates("finetune export ") == ["runs/one", "runs/two"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["finetune", "tr"], "train"),
        (["finetune", "train", "quickstart", "trainer.schedule", "=", "cos"], "cosine"),
        (["finetune", "train", "quickstart", "trainer.schedule", "="], "constant cosine linear"),
    ],
)
def test_the_bash_function_completes(words: list[str], wanted: str, tmp_path: Path) -> None:
    """bash splits words at `=`, as COMP_WORDS shows here, and replaces only the last part."""
    command = tmp_path / "finetune"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from finetune.cli.main import entry; entry()" "$@"\n')
    command.chmod(0o755)
    line = " ".join(words).replace(" = ", "=").replace(" =", "=")
    script = (
        f"{SCRIPTS['bash']}\nCOMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=({' '.join(words)})\n"
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _finetune; echo "${COMPREPLY[@]}"'
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment, timeout=60
    )
    assert found.stdout.strip() == wanted, found.stderr
