"""The groups under configs/, the options each has, and which of them run.yaml, a recipe or the command line chooses."""

from __future__ import annotations

from pathlib import Path

from finetune.config.keys import suggest_word
from finetune.config.layers import Layer, read_yaml
from finetune.config.locate import shipped_dir
from finetune.errors import ConfigError


def groups() -> list[str]:
    """List the groups: the folders of configs/."""
    return sorted(path.name for path in shipped_dir("configs").iterdir() if path.is_dir())


def options(group: str) -> list[str]:
    """List a group's options: the files of its folder, without their suffix."""
    return sorted(path.stem for path in (shipped_dir("configs") / group).glob("*.yaml"))


def option_file(group: str, option: str) -> Path:
    """Name the file of a group's option."""
    return shipped_dir("configs") / group / f"{option}.yaml"


def checked_option(group: str, option: str, place: str) -> str:
    """Give the option back if the group has it.

    Args:
        group: a folder of configs/.
        option: a file of it, without its suffix.
        place: where the choice was written, for the message.

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
    """Read which option of each group configs/run.yaml starts from."""
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
                f"{place}: a recipe's defaults cannot hold {entry!r}",
                fix="each entry reads `- override /GROUP: OPTION`, such as `- override /model: gpt_oss_20b`",
            )
        group = words[1].removeprefix("/")
        choices[group] = checked_option(group, option, place)
    lines = {key: line for key, line in layer.lines.items() if key[0] != "defaults"}
    return Layer(layer.label, data, lines), choices
