"""Our files beside an adapter: finetune.json (its base, and hashes) and router_bias.json.

router_bias.json exists where routers are trained in full: PEFT's layout has no place for the change of a bias, so only
merges use it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import __version__, log
from finetune.adapters.config_file import has_control_characters
from finetune.errors import InputError
from finetune.files import sha256_of, write_json
from finetune.model.headers import plain_file_name

PROVENANCE = "finetune.json"  # ours: PEFT, vLLM and SGLang ignore files they do not know
ROUTER_BIAS = "router_bias.json"  # not safetensors: SGLang reads every such file of a directory


# ---- the base an adapter belongs to, and finetune.json


StorageChanges = Mapping[str, Mapping[str, str | float]]
"""Part of a base whose storage format changed its values -> `format` and `relative_rms`, see `Base.storage_changes`."""


@dataclass(frozen=True)
class BaseRecord:
    """The base as recorded in an adapter's files.

    Attributes:
        name: directory or hub name.
        revision: of a hub name.
        identity: see `finetune.model.identity`; None if it was not checked.
        storage: parts of the base that were rounded further while training -> `format` and `relative_rms`.
        tokenizer: SHA-256 of its tokenizer.json; None if it had none, or in files of version 0.2.
    """

    name: str | None = None
    revision: str | None = None
    identity: str | None = None
    storage: StorageChanges = field(default_factory=dict)
    tokenizer: str | None = None

    def as_provenance(self) -> dict[str, Any]:
        """As finetune.json has it."""
        record: dict[str, Any] = {
            "base_name": self.name,
            "base_revision": self.revision,
            "base_identity": self.identity,
        }
        if self.tokenizer is not None:
            record["base_tokenizer_sha256"] = self.tokenizer
        return record | ({"base_held_as": dict(self.storage)} if self.storage else {})

    def as_json(self) -> dict[str, str | None]:
        """As export.json has it."""
        return {"name": self.name, "revision": self.revision, "identity": self.identity}


@dataclass(frozen=True)
class Provenance:
    """finetune.json: the base, and the SHA-256 of the files beside it."""

    base: BaseRecord
    files: Mapping[str, str]


def read_provenance(directory: Path) -> Provenance | None:
    """Read finetune.json and compare the files with it; None without the file.

    Raises:
        InputError: no directory, the file cannot be read, or another file is missing or not the one that was written.
    """
    if not directory.is_dir():
        raise InputError(f"no adapter directory {directory}")
    path = directory / PROVENANCE
    if not path.exists():
        return None
    try:
        provenance = _parse_provenance(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from error
    for name, digest in provenance.files.items():
        if not (directory / plain_file_name(name, path)).is_file():
            raise InputError(f"{directory} lacks {name}")
        if sha256_of(directory / name) != digest:
            raise InputError(f"{directory / name} is not the file that was written", why="its SHA-256 differs")
    return provenance


def _parse_provenance(content: Mapping[str, Any]) -> Provenance:
    texts = (content.get("base_name"), content.get("base_revision"), content["base_identity"])
    tokenizer = content.get("base_tokenizer_sha256")
    if not all(isinstance(text, str | None) for text in (*texts, tokenizer)):
        raise ValueError("the base's name, revision, identity and tokenizer must be text")
    if any(has_control_characters(text) for text in texts if text):
        raise ValueError("the base's name, revision and identity must be without control characters")
    storage = content.get("base_held_as") or {}
    for part in storage.values():
        str(part["format"]), float(part["relative_rms"])
    return Provenance(BaseRecord(*texts, storage, tokenizer), dict(content["files"]))


def write_provenance(directory: Path, record: Mapping[str, Any]) -> None:
    """Write finetune.json: a record, and the hashes of all files that are in the directory by now."""
    files = {path.name: sha256_of(path) for path in sorted(directory.iterdir())}
    write_json(directory / PROVENANCE, {"written_by": f"gpt-oss-finetune {__version__}", **record, "files": files})


def refuse_other_base(base: BaseRecord, identity: str, where: Path) -> None:
    """Raise InputError if an adapter was trained on another base than `identity`; warn if that is not known."""
    if base.identity is None:
        log.warning(f"{where} was imported without its base: whether it belongs to this one cannot be checked")
    elif base.identity != identity:
        raise InputError(
            f"{where} was trained on another base",
            why=f"it belongs to {base.name} ({base.identity[:12]}), this one is {identity[:12]}",
            fix="set model.path (and model.revision) to the base it was trained on",
        )


def warn_other_storage(base: BaseRecord, storage: StorageChanges, where: Path) -> None:
    """Warn if an adapter was trained over other values of its base than those it is used with now.

    Args:
        base: what the adapter records.
        storage: how the base is stored now; empty: as the checkpoint has it.
        where: the adapter, for the message.
    """
    formats, now = ({part: change["format"] for part, change in record.items()} for record in (base.storage, storage))
    if formats == now:
        return
    trained = [
        f"{part} in {change['format']} (off by {float(change['relative_rms']):.1%})"
        for part, change in base.storage.items()
    ]
    here = ", ".join(f"{part} in {form}" for part, form in now.items()) or "the checkpoint's own values"
    log.warning(
        f"{where} was trained over {', '.join(trained) or 'the checkpoint as it is'}, and is used with {here}: "
        "that is another function, and its evaluation says nothing about it; evaluate again"
    )


# ---- router_bias.json


def write_router_bias(directory: Path, changes: Mapping[str, Tensor]) -> None:
    """Write router_bias.json into an adapter directory; nothing if there is no change."""
    if changes:
        content = {name: change.tolist() for name, change in changes.items()}
        (directory / ROUTER_BIAS).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_router_bias(directory: Path) -> dict[str, Tensor]:
    """Read router_bias.json: float32 [E] by the tensor's name; empty without the file.

    Raises:
        InputError: it cannot be read, or a value is not finite.
    """
    path = directory / ROUTER_BIAS
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it has no names")
        changes = {str(name): torch.tensor(values, dtype=torch.float32) for name, values in content.items()}
    except (OSError, ValueError, TypeError, RecursionError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from error
    for name, change in changes.items():
        if change.dim() != 1 or not change.isfinite().all():
            raise InputError(f"{path}: {name} is not a list of finite numbers")
    return changes
