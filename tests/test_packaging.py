"""What a wheel and a source distribution hold, and that an installed wheel finds it."""

from __future__ import annotations

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
    assert [name for name in names if "medical" in name.lower() and "/data/" in name] == []
    assert any("/data/legal/" in name for name in names)


def test_an_installed_wheel_finds_its_recipes(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import finetune; from finetune.cli.main import main; from finetune.config.locate import shipped_dir\n"
        "print(finetune.__file__, shipped_dir('data'), main(['train', 'legal_20b', '--dry-run']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/finetune/__init__.py {tmp_path}/finetune/_shipped/data 0"


def test_make_prints_its_targets():
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "test-slow", "check", "clean"):
        assert f"make {target} " in listed
