"""Whose texts a model was made from, for its card: those of the base's own pretraining, and those of the recipe's data.

A base says it in its README.md under `## Attribution`; our own cards have that section too, so that what is trained on
an export carries on what the export carried.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.config.locate import shipped_dir
from finetune.model.tiny import ATTRIBUTION

_SHIPPED = "shipped://"
UNKNOWN_LICENCE = "licence not recorded; establish it before you publish this model"


def attribution_section(base: Mapping[str, Any], sources: Iterable[str] | None) -> str:
    """The card's section.

    Args:
        base: what export.json says of the base.
        sources: paths of the data that the adapter was trained on, as the recipe has them; None: not known.
    """
    parts = [f"{ATTRIBUTION}\n\n**The base**:\n\n{of_base(base)}"]
    if sources is not None:
        lines = [f"- `{shown_name(path)}`: {of_source(path) or UNKNOWN_LICENCE}" for path in sorted(sources)]
        parts.append("**What the adapter was trained on**:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def of_base(base: Mapping[str, Any]) -> str:
    """What a base's own README.md says under `## Attribution`; where there is none, that its terms are its maker's."""
    name = base["name"]
    if not name:
        return "Not named by the adapter; its terms apply."
    if base["revision"]:  # a hub name
        return f"`{name}`; its licence and usage policy go with this model."
    card = Path(name).expanduser() / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return f"`{Path(name).name}`. Its README.md was not there: carry its terms and attributions on yourself."
    section = text.partition(f"\n{ATTRIBUTION}\n")[2].partition("\n## ")[0].strip()
    return section or f"`{Path(name).name}`. Its README.md names no attributions; its licence goes with this model."


def of_source(path: str) -> str | None:
    """Source, licence and changes of a shipped file as data/LICENSES.md has them, None if it is not one."""
    entries = [_entry(path, key) for key in ("Source", "Licence", "Changed")]
    return " ".join(entry for entry in entries if entry) or None


def licence_of(path: str) -> str | None:
    """What data/LICENSES.md says of a shipped file's licence, None if it is not one."""
    return _entry(path, "Licence")


def shown_name(path: str) -> str:
    """A data path without where it lies on this machine."""
    return path.removeprefix(_SHIPPED) if path.startswith(_SHIPPED) else Path(path).name


def _entry(path: str, key: str) -> str | None:
    listing = shipped_dir("data") / "LICENSES.md"
    if not path.startswith(_SHIPPED) or not listing.is_file():
        return None
    name = re.escape(path.removeprefix(_SHIPPED))
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", listing.read_text(encoding="utf-8"), re.M | re.S)
    entry = section and re.search(rf"- \*\*{key}\*\*: (.*?)(?=\n- \*\*|\Z)", section[1], re.S)
    return " ".join(entry[1].split()) if entry else None
