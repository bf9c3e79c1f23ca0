"""Contents of the wheel and the source distribution, which an installed wheel finds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and a source distribution of this tree (hatchling alone: no network, no isolation)."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def wheel_files(built) -> set[str]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        return set(wheel.namelist())


def shipped(folder: str) -> set[str]:
    """Files of a top-level folder, but not the medical sample, whose abstracts are not ours to redistribute."""
    paths = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path for path in paths if not path.startswith("data/medical/") and "__pycache__" not in path}


@pytest.mark.parametrize("folder", ["configs", "recipes", "data"])
def test_wheel_holds_what_ships(wheel_files, folder):
    inside = {name.removeprefix("finetune/_shipped/") for name in wheel_files}
    assert shipped(folder), f"{folder}/ is empty"
    assert shipped(folder) <= inside


def test_wheel_has_one_top_level_package(wheel_files):
    tops = {name.split("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"finetune"}
    assert "finetune/py.typed" in wheel_files
    assert any(name.endswith("licenses/LICENSE") for name in wheel_files)


def test_no_distribution_holds_the_medical_sample(built, wheel_files):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = wheel_files | set(sdist.getnames())
    assert [name for name in names if re.search("/data/medical/|pubmedqa_labeled", name)] == []
    assert any("/data/legal/" in name for name in names)


INSTALLED = """
import sys
import finetune
from finetune.cli.main import main
from finetune.config.paths import shipped_dir
codes = []
for words in (
    ["recipes"], ["config", "show", "quickstart"], ["estimate", "legal_120b"], ["doctor"],
    ["train", "legal_20b", "--dry-run"], ["train", "medical_20b", "--dry-run"],
):
    codes.append(main(words))
    assert "torch" not in sys.modules or words[0] in ("doctor", "train"), words
print(finetune.__file__, shipped_dir("data"), *codes)
"""


def test_an_installed_wheel_works_outside_the_checkout(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    work = tmp_path / "elsewhere"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(work), "XDG_DATA_HOME": str(work / "share")}
    command = [sys.executable, "-c", INSTALLED]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=True, env=environment)
    last = done.stdout.splitlines()[-1].split()
    assert last[:2] == [f"{tmp_path}/site/finetune/__init__.py", f"{tmp_path}/site/finetune/_shipped/data"]
    *codes, medical = map(int, last[2:])
    # The doctor says 5 where this machine lacks something; what it found is printed either way.
    assert [code for code in codes if code] in ([], [5]) and codes[3] in (0, 5), done.stderr
    assert "debug/profile" in done.stdout and "openai-harmony" in done.stdout
    assert "67.5 GiB" in done.stdout or "fits" in done.stdout
    assert medical == 3 and "finetune data prepare medical" in done.stderr
    assert list(work.rglob("*.gz")) == []


def test_extras_are_declared(wheel_files, built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        name = next(name for name in wheel_files if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(name).decode().splitlines()
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert {"gpu", "deepspeed", "export", "dev", "data", "tracking", "tensorboard"} <= extras


def test_the_source_distribution_holds_what_it_is_built_and_read_from(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in (
        "pyproject.toml",
        "README.md",
        "recipes/debug/profile.yaml",
        "configs/run.yaml",
        "docs/guide/start.md",
    ):
        assert name in names
    assert {"data/legal/cuad_clause_type.jsonl.gz", "data/tokenizer/o200k_base.tiktoken"} <= names


def test_make_prints_its_targets():
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "test-slow", "check", "clean"):
        assert f"make {target} " in listed
