"""Recipes (shipped ones by name, others by path) and the groups under configs/ whose options they choose."""

from __future__ import annotations

import shlex
from pathlib import Path

from finetune.config.layers import Layer, read_yaml
from finetune.config.paths import shipped_dir
from finetune.config.suggest import suggest_path, suggest_word
from finetune.errors import ConfigError


def groups() -> list[str]:
    """List the groups: the folders of configs/."""
    return sorted(path.name for path in shipped_dir("configs").iterdir() if path.is_dir())


def options(group: str) -> list[str]:
    """List a group's options: the files of its folder, without their suffix."""
    return sorted(path.stem for path in (shipped_dir("configs") / group).glob("*.yaml"))


def option_file(group: str, option: str) -> Path:
    """Give the file of a group's option."""
    return shipped_dir("configs") / group / f"{option}.yaml"


def checked_option(group: str, option: str, place: str) -> str:
    """Return the option if the group has it.

    Args:
        group: a folder of configs/.
        option: a file in it, without its suffix.
        place: file and line of the choice, for the message.

    Raises:
        ConfigError: no such group or option; names the nearest.
    """
    if group not in groups():
        fix = suggest_word(group, groups()) or f"groups: {', '.join(groups())}"
        raise ConfigError(f"{place}: there is no group {group}", fix=fix)
    if option not in options(group):
        fix = suggest_word(option, options(group)) or f"{group} is one of {', '.join(options(group))}"
        raise ConfigError(f"{place}: the group {group} has no option {option}", fix=fix)
    return option


def default_choices() -> dict[str, str]:
    """Read each group's default option from configs/run.yaml."""
    entries = read_yaml(shipped_dir("configs") / "run.yaml").data["defaults"]
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {group: option for group, option in pairs if group in groups()}


def split_recipe(layer: Layer) -> tuple[Layer, dict[str, str]]:
    """Split a recipe into the keys it sets and the options that its `defaults` list chooses.

    Raises:
        ConfigError: an entry is not `override /GROUP: OPTION` for a group and an option that exist.
    """
    data = dict(layer.data)
    entries = data.pop("defaults", [])
    choices: dict[str, str] = {}
    for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        place = layer.place(("defaults", str(index))) or layer.label
        if entry == "_self_":
            continue
        key, option = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (str(entry), None)
        words = key.split()
        if len(words) != 2 or words[0] != "override" or not words[1].startswith("/") or not isinstance(option, str):
            raise ConfigError(
                f"{place}: a recipe's defaults cannot contain {entry!r}",
                fix="each entry reads `- override /GROUP: OPTION`, such as `- override /model: gpt_oss_20b`",
            )
        group = words[1].removeprefix("/")
        choices[group] = checked_option(group, option, place)
    lines = {key: line for key, line in layer.lines.items() if key[0] != "defaults"}
    return Layer(layer.label, data, lines), choices


def list_recipes() -> dict[str, Path]:
    """List the shipped recipes: name (with its subfolder, such as `debug/one_step`) to file, sorted by name."""
    root = shipped_dir("recipes")
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


_DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".txt")


def find_recipe(recipe: str) -> Path:
    """Find a recipe's file.

    Args:
        recipe: a shipped recipe's name (its subfolder may be left out if that is clear), or the path of a YAML file.

    Raises:
        ConfigError: there is no such recipe.
    """
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.exists() and not path.is_file():
            raise ConfigError(f"{recipe} is not a file", why="a recipe is a file of YAML", fix="give the file's path")
        if not path.is_file():
            own = [file for file in path.parent.glob("*.y*ml") if file.suffix in (".yaml", ".yml")]
            raise ConfigError(f"there is no recipe file {recipe}", fix=suggest_path(path, own) or _fix(path.stem))
        return path
    shipped = list_recipes()
    if recipe in shipped:
        return shipped[recipe]
    same_stem = [name for name in shipped if name.rpartition("/")[2] == recipe]
    if len(same_stem) == 1:
        return shipped[same_stem[0]]
    if same_stem:
        raise ConfigError(f"several recipes are called {recipe}", fix=f"write one of {', '.join(same_stem)}")
    _refuse_other_things(recipe, path)
    beside = path.with_name(path.name + ".yaml")
    fix = f"for your own file write {beside}" if beside.is_file() else _fix(recipe)
    raise ConfigError(f"there is no recipe called {recipe}", fix=fix)


def _refuse_other_things(recipe: str, path: Path) -> None:
    """Answer a data file, a run, a base or a model's name in a recipe's place with the command that takes it.

    Raises:
        ConfigError: it is one of these.
    """
    quoted = shlex.quote(recipe)
    what = fix = None
    if (path / "config.yaml").is_file():
        what = "a run"
        fix = f"finetune train --resume {quoted} continues it; finetune evaluate, export and report take it too"
    elif (path / "adapter_config.json").is_file():
        what, fix = (
            "an adapter",
            f"finetune adapter show {quoted}; a recipe starts from it with adapter.init_from={quoted}",
        )
    elif (path / "config.json").is_file() or recipe.lower().startswith(("openai/", "unsloth/", "gpt-oss")):
        name = recipe if "/" in recipe or path.is_dir() else f"openai/{recipe}"
        like = "legal_120b" if "120b" in recipe else "legal_20b"
        what, fix = "a model", f"give a recipe and the model: finetune train {like} model.path={shlex.quote(name)}"
    elif path.is_file() or path.suffix.lower() in _DATA_ENDINGS:
        what = "a data file"
        fix = f"finetune recipes new mine.yaml --data {quoted} writes a recipe for it"
    if what is not None:
        raise ConfigError(f"{recipe} is {what}, not a recipe", fix=fix)


def recipe_name(path: Path) -> str:
    """Give a recipe file's name: as in `list_recipes` if it ships with the toolkit, else its stem."""
    shipped = {file.resolve(): name for name, file in list_recipes().items()}
    return shipped.get(path.resolve(), path.stem)


def recipe_summary(path: Path) -> str:
    """Read a recipe's first comment line (after the `@package` line), which says what it is for."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
    return ""


def _fix(name: str) -> str:
    shipped = list_recipes()
    stems = [*shipped, *(full.rpartition("/")[2] for full in shipped)]
    return suggest_word(name, stems) or f"recipes: {', '.join(shipped)}; or the path of a .yaml file"
