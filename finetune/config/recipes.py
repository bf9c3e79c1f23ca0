"""Find recipes: the ones that ship with the toolkit by name, anyone's own by path."""

from __future__ import annotations

from pathlib import Path

from finetune.config.keys import suggest_word
from finetune.config.locate import shipped_dir
from finetune.config.near import near_path
from finetune.errors import ConfigError


def list_recipes() -> dict[str, Path]:
    """List the shipped recipes: name (with its subfolder, such as `debug/one_step`) to file, sorted by name."""
    root = shipped_dir("recipes")
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """Find a recipe's file.

    Args:
        recipe: a shipped recipe's name (its subfolder may be left out if that is clear), or the path of a YAML file.

    Raises:
        ConfigError: there is no such recipe.
    """
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            own = [file for file in path.parent.glob("*.y*ml") if file.suffix in (".yaml", ".yml")]
            raise ConfigError(f"there is no recipe file {recipe}", fix=near_path(path, own) or _fix(path.stem))
        return path
    shipped = list_recipes()
    if recipe in shipped:
        return shipped[recipe]
    same_stem = [name for name in shipped if name.rpartition("/")[2] == recipe]
    if len(same_stem) == 1:
        return shipped[same_stem[0]]
    if same_stem:
        raise ConfigError(f"several recipes are called {recipe}", fix=f"write one of {', '.join(same_stem)}")
    beside = path.with_name(path.name + ".yaml")
    fix = f"for your own file write {beside}" if beside.is_file() else _fix(recipe)
    raise ConfigError(f"there is no recipe called {recipe}", fix=fix)


def recipe_name(path: Path) -> str:
    """Name a recipe file: as `list_recipes` does if it ships with the toolkit, else by its stem."""
    shipped = {file.resolve(): name for name, file in list_recipes().items()}
    return shipped.get(path.resolve(), path.stem)


def first_comment(path: Path) -> str:
    """Take a recipe's first comment line (after the `@package` line): what it says it is for."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
    return ""


def _fix(name: str) -> str:
    shipped = list_recipes()
    stems = [*shipped, *(full.rpartition("/")[2] for full in shipped)]
    return suggest_word(name, stems) or f"recipes: {', '.join(shipped)}; or the path of a .yaml file"
