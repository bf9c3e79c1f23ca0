"""No pickle, no remote code, nothing written outside, no secret in any file of a run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from small_run import finetune

from finetune.cli.main import main

SOURCES = sorted(
    p for folder in ("finetune", "bench", "scripts") for p in (Path(__file__).parents[1] / folder).rglob("*.py")
)
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
RUNS_CODE = {"eval", "exec"}


def offences(source: str) -> list[str]:
    """Calls in a module that could load a pickle or run foreign code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module)] if (node.module or "").split(".")[0] in PICKLES else []
            found += [f"torch.{a.name}" for a in node.names if node.module == "torch" and a.name in ("load", "save")]
        elif isinstance(node, ast.Attribute) and node.attr in ("load", "save", "load_state", "save_state"):
            owner = ast.unparse(node.value)
            found += [f"{owner}.{node.attr}"] if owner == "torch" or node.attr.endswith("_state") else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNS_CODE:
            found.append(node.func.id)
        elif isinstance(node, ast.keyword) and node.arg in (
            "allow_pickle",
            "trust_remote_code",
            "weights_only",
            "shell",
        ):
            safe = node.arg == "weights_only" or (isinstance(node.value, ast.Constant) and node.value.value is False)
            found += [] if safe else [f"{node.arg}={ast.unparse(node.value)}"]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "accelerator.load_state(x)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_scan_sees_an_offence(source: str) -> None:
    assert len(offences(source)) == 1


def test_no_source_of_ours_loads_a_pickle_or_runs_code_from_elsewhere() -> None:
    assert len(SOURCES) > 100
    found = {path.name: offences(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: names for name, names in found.items() if names} == {}


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors"])
def test_a_pickled_adapter_is_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Under its own name and under that of safetensors."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save({"bomb": Bomb(tmp_path / "mark")}, adapter / name)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    for command in (
        ["adapter", "show"],
        ["adapter", "import", "--out", str(tmp_path / "out")],
        ["export", "--to", "peft"],
    ):
        assert main([*command, str(adapter)]) == 3
        assert "safetensors" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_pickled_checkpoint_is_refused_unread(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever can write a checkpoint can write its hashes too, so that these cannot be what keeps pickle out."""
    import hashlib

    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("adapter", "report.md"))
    (run / "manifest.json").write_text(
        json.dumps(json.loads((run / "manifest.json").read_text()) | {"status": "stopped"})
    )
    for checkpoint in (run / "checkpoints").glob("step-*"):
        torch.save({"bomb": Bomb(tmp_path / "mark")}, checkpoint / "optimizer.safetensors")
        content = json.loads((checkpoint / "manifest.json").read_text())
        content["files"]["optimizer.safetensors"] = hashlib.sha256(
            (checkpoint / "optimizer.safetensors").read_bytes()
        ).hexdigest()
        (checkpoint / "manifest.json").write_text(json.dumps(content))
    assert main(["checkpoints", "verify", str(run)]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 3
    assert "optimizer.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


# ---- nothing is written outside -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../escape", "..", "a/b", "/tmp/escape", "a\\\\b"])
def test_a_run_s_name_cannot_leave_its_directory(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "runs").mkdir()
    recipe = str(workplace / "small.yaml")
    assert main(["train", recipe, f"output_dir={tmp_path / 'runs'}", f"name='{name}'", "--dry-run"]) == 2
    assert "without a slash" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_base_s_index_cannot_name_files_outside(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: tuple[Path, str]
) -> None:
    """Shard names become names of files that a merge writes."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (base / shard).rename(tmp_path / "outside.safetensors")
    moved = {name: "../outside.safetensors" if file == shard else file for name, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": moved}))
    out = tmp_path / "out"
    assert main(["export", str(finished[0]), "--to", "mxfp4", "--base", str(base), "--out", str(out)]) == 3
    assert "../outside.safetensors" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "outside.safetensors"]


def test_a_manifest_cannot_name_files_outside(finished: tuple[Path, str], tmp_path: Path) -> None:
    from finetune.train.checkpoint import fault_in, list_checkpoints

    path = tmp_path / "step-00000001"
    shutil.copytree(list_checkpoints(finished[0] / "checkpoints")[-1][1], path)
    content = json.loads((path / "manifest.json").read_text())
    content["files"]["../../outside"] = "0"
    (path / "manifest.json").write_text(json.dumps(content))
    assert fault_in(path) == "manifest.json lists '../../outside', which is not a file's name"


# ---- secrets --------------------------------------------------------------------------------------------------------

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")


def leaks(directory: Path, secret: str) -> list[str]:
    """Files below a directory whose bytes, name or link hold a secret."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [
        str(path.relative_to(directory)) for path in files if secret.encode() in str(path).encode() + path.read_bytes()
    ]


@pytest.mark.slow
def test_secrets_of_the_environment_reach_no_file_of_a_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With wandb writing its own files into the run directory."""
    secret = "cafe" * 10  # the form of a wandb key: 40 hexadecimal digits
    for name in SECRETS:
        monkeypatch.setenv(name, secret)
    arguments = ("train", workplace / "small.yaml", f"output_dir={tmp_path}", "name=run", "trainer.max_steps=2")
    process = finetune(*arguments, "logging=wandb", "evaluate.test_examples=3", "evaluate.every_steps=null")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb")), errors
    assert secret not in output + errors
    assert leaks(tmp_path / "run", secret) == []


def test_secrets_of_the_environment_reach_no_file_without_a_tracker(
    train: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "cafe" * 10
    for name in SECRETS:
        monkeypatch.setenv(name, secret)
    code, run = train("trainer.max_steps=2", "evaluate.test_examples=3", "evaluate.every_steps=null")  # type: ignore[operator]
    assert code == 0
    assert leaks(run, secret) == []
    (run / "note").write_text(secret)
    assert leaks(run, secret) == ["note"]
