"""Reads a run's manifest.json: every key that is used has a type, and a file of another form is refused by that key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.files import read_json
from finetune.records import parse_record

MANIFEST_FILE = "manifest.json"
_FIX = "put the manifest.json back that the run wrote"


@dataclass(frozen=True)
class _Base:
    name: str | None = None
    revision: str | None = None
    identity: str = ""
    tokenizer_sha256: str | None = None
    held_as: dict[str, dict[str, Any]] = field(default_factory=dict)
    storage: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Split:
    rows: int
    tokens: int
    trained_tokens: int
    fingerprint: str
    skipped_rows: int = 0
    control_text: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Loop:
    best_loss: float | None = None


@dataclass(frozen=True)
class _Manifest:
    """What is read of a manifest.json; a key is missing before a run has come so far, or in files of other versions."""

    status: Literal["running", "stopped", "finished"] | None = None
    stopped_by: str | None = None
    recipe: str | None = None
    overrides: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    base: _Base = field(default_factory=_Base)
    data: dict[str, _Split] = field(default_factory=dict)
    adapter_parameters: dict[str, int] = field(default_factory=dict)
    adapter_norms: dict[str, float] | None = None
    total_steps: int | None = None
    working_directory: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    audit: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    loop: _Loop = field(default_factory=_Loop)
    minutes: float = 0.0
    peak_memory_gib: float = 0.0
    read_back: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None


def read_manifest(run: Path) -> dict[str, Any]:
    """Read the manifest.json of a run directory; {} if there is none yet.

    Returns:
        The file's content, whose keys have the types above.

    Raises:
        InputError: it is not JSON, or a key has a value of another type.
    """
    path = run / MANIFEST_FILE
    if not path.exists():
        return {}
    content = read_json(path, "a run's manifest", _FIX)
    parse_record(_Manifest, content, str(path), fix=_FIX)
    return content
