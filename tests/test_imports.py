"""Imports go one way. The table below is the architecture; docs/design.md draws it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import finetune

PACKAGE = Path(finetune.__file__).parent

# What each part may import of the others. Everything may import finetune.errors, finetune.log and finetune itself.
ALLOWED = {
    "config": set(),
    "mxfp4": set(),
    "data": {"config", "mxfp4"},
    "kernels": {"config", "mxfp4"},
    "model": {"config", "mxfp4", "data", "kernels"},
    "adapters": {"config", "mxfp4", "data", "kernels", "model"},
    "objectives": {"config", "mxfp4", "data", "kernels", "model", "adapters"},
    "evaluate": {"config", "mxfp4", "data", "kernels", "model", "adapters", "objectives"},
    "rounding": {"config", "mxfp4", "data", "kernels", "model", "adapters"},
    "train": {"config", "mxfp4", "data", "kernels", "model", "adapters", "objectives", "evaluate"},
    "export": {"config", "mxfp4", "data", "kernels", "model", "adapters", "objectives", "evaluate", "rounding"},
    "estimate": {"config"},
    "report": {"config"},
    "__main__": {"cli"},
    "doctor": {"config", "data", "kernels"},
    "cli": {"config", "data", "model", "adapters", "evaluate", "train", "export", "estimate", "report", "doctor"},
}
FREE = {"errors", "log", "arch", "files", "machine", "figures", "manifest", "markdown", "records", "results"}

# files and machine import torch inside the functions that need it; tests/test_files_and_seeds.py holds that.
# Libraries that only some places may import at all.
RESERVED = {
    "hydra": {"config/compose.py"},
    "omegaconf": {"config/compose.py"},
}
WITHOUT_TORCH = (
    "config",
    "cli",
    "estimate",
    "report",
    "errors",
    "log",
    "arch",
    "figures",
    "manifest",
    "markdown",
    "records",
    "results",
)
HEAVY = {"torch", "transformers", "peft", "accelerate", "deepspeed"}


def imported(source: str, module: str) -> set[str]:
    """Dotted names that a module's source imports, wherever in it, relative ones made absolute."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            stem = ".".join([*base, node.module] if node.module else base)
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, relative: str) -> list[str]:
    """Forbidden imports of a file (its path relative to the package)."""
    module = "finetune." + relative.removesuffix(".py").replace("/", ".")
    part = relative.split("/")[0].removesuffix(".py")
    found = []
    for name in sorted(imported(source, module)):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        inside = top == "finetune" and (PACKAGE / other).is_dir() and other not in (part, "")
        if inside and other not in ALLOWED.get(part, set()) | FREE:
            found.append(f"{relative} imports {name}")
        if top in RESERVED and relative not in RESERVED[top]:
            found.append(f"{relative} imports {name}, reserved for {', '.join(RESERVED[top])}")
        if part in WITHOUT_TORCH and top in HEAVY:
            found.append(f"{relative} imports {name}; {part} works without it")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    assert violations(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()) == []


def test_every_part_is_in_the_table():
    parts = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts <= set(ALLOWED)


def test_the_table_has_no_cycle():
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [part for part, below in ALLOWED.items() if part not in order and below <= set(order)]
        assert ready, f"cycle among {set(ALLOWED) - set(order)}"
        order += ready


@pytest.mark.parametrize(
    ("source", "relative"),
    [
        ("from finetune.objectives.router import x", "model/made_up.py"),
        ("def f():\n    import finetune.cli.main", "train/made_up.py"),
        ("from ..evaluate import labels", "adapters/made_up.py"),
        ("from finetune import train", "report/made_up.py"),
        ("from omegaconf import OmegaConf", "config/validate.py"),
        ("import torch", "config/made_up.py"),
        ("if 1:\n    from torch.nn import Linear", "cli/made_up.py"),
        ("from finetune.model import build", "errors.py"),
    ],
)
def test_a_wrong_import_is_seen(source, relative):
    assert len(violations(source, relative)) == 1


@pytest.mark.parametrize(
    ("source", "relative"),
    [
        ("from finetune.model.build import load\nimport torch", "adapters/made_up.py"),
        ("from .losses import x\nfrom ..errors import CheckError", "train/made_up.py"),
        ("import hydra", "config/compose.py"),
    ],
)
def test_a_right_import_is_let_through(source, relative):
    assert violations(source, relative) == []


ROOT = PACKAGE.parent
OUTSIDE = sorted(
    path for folder in ("bench", "scripts", "docs/notebooks", "tests") for path in (ROOT / folder).rglob("*.py")
)


def missing_names(path: Path) -> list[str]:
    """Names that a file outside the package imports from it and that do not exist, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("finetune"):
            continue
        place = PACKAGE.joinpath(*str(node.module).split(".")[1:])
        module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if not module.is_file():
            found.append(f"{path.name}: {node.module}")
            continue
        tree = ast.parse(module.read_text(encoding="utf-8"))
        known = {
            alias.asname or alias.name
            for n in ast.walk(tree)
            for alias in getattr(n, "names", [])
            if hasattr(alias, "name")
        }
        known |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        known |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for alias in node.names:
            inside = place / alias.name
            if alias.name not in known and not inside.is_dir() and not inside.with_suffix(".py").is_file():
                found.append(f"{path.name}: {node.module}.{alias.name}")
    return found


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_imported_from_outside_exist(path):
    assert missing_names(path) == []


def test_a_missing_name_is_seen(tmp_path):
    (tmp_path / "made_up.py").write_text("def f():\n    from finetune.errors import NoSuchError, InputError\nimport os")
    assert missing_names(tmp_path / "made_up.py") == ["made_up.py: finetune.errors.NoSuchError"]
    (tmp_path / "made_up.py").write_text("from finetune.no_such import x")
    assert missing_names(tmp_path / "made_up.py") == ["made_up.py: finetune.no_such"]
