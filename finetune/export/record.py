"""The contents of export.json as classes with fields; `as_json` gives the file's form."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from finetune import __version__
from finetune.adapters.store import WEIGHTS, AdapterFile, BaseRecord
from finetune.files import sha256_of

if TYPE_CHECKING:
    from finetune.export.survival.weights import Survival


NULL = {"null": True}
"""Metadata of a field that is written as null where it is None; other fields are then left out."""


def as_json(record: Any) -> dict[str, Any]:
    """A record as export.json has it: its fields in order, but for those that are None (see `NULL`)."""
    values = ((each, getattr(record, each.name)) for each in fields(record))
    return {each.name: _plain(value) for each, value in values if value is not None or "null" in each.metadata}


def _plain(value: Any) -> Any:
    if hasattr(value, "as_json"):  # a record with a form of its own
        return value.as_json()
    if is_dataclass(value):
        return as_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Skipped:
    """A check that was not made, and why."""

    skipped: str


@dataclass(frozen=True)
class Failed:
    """A check that failed, and how."""

    failed: str


@dataclass(frozen=True)
class AdapterCheck:
    """An exported adapter, read back by its target's layout in a fresh process.

    Attributes:
        sites: compared: layers x projections x experts.
        kinds: sites by projection.
        zeros: projections that were added for the server and do nothing.
        max_relative_difference: of what a site computes from random vectors, against the source.
    """

    sites: int
    kinds: Mapping[str, int]
    zeros: int
    max_relative_difference: float


@dataclass(frozen=True)
class WeightsCheck:
    """Every weight of a merged checkpoint against base + update.

    Attributes:
        tensors_changed: tensors that the adapter changes.
        comparisons: made in all.
        updates: by tensor: norm of the update as PEFT's file gives it (`expected`), as it is in the result (`found`),
            and their `projection`.
    """

    tensors_changed: int
    comparisons: int
    updates: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class LogitsDistance:
    """Two models on the same positions: largest difference of logits, mean KL in nats, equal likeliest tokens."""

    max_difference: float
    mean_kl: float
    argmax_agreement: float


@dataclass(frozen=True)
class LogitsCheck:
    """transformers' logits of the merged directory on some examples.

    Attributes:
        samples: examples compared.
        dtype: computed in.
        limit: of the difference to `merged` that rounding explains (`finetune.model.noise`).
        problems: keys that did not load cleanly; none.
        adapted: against the live base + adapter.
        base: against the plain base.
        merged: against our own reader of the files; for MXFP4 only.
    """

    samples: int
    dtype: str
    limit: float | None
    problems: Mapping[str, list[str]]
    adapted: LogitsDistance
    base: LogitsDistance
    merged: LogitsDistance | None = None


@dataclass(frozen=True)
class MergeCheck:
    """The verification of a merged checkpoint."""

    weights: WeightsCheck
    logits: LogitsCheck | Skipped


Verification = AdapterCheck | MergeCheck | Skipped | Failed


@dataclass(frozen=True)
class AdapterOrigin:
    """The adapter that an export is made from: its directory, the SHA-256 of its weights, and its number of sites."""

    directory: str
    sha256: str
    sites: int


@dataclass(kw_only=True)
class ExportRecord:
    """export.json, but for the hashes of the files; filled during the export.

    Attributes:
        written_by, written: this tool and its version, date and time.
        target: of the export.
        experts: how a merge stores experts, `bf16` or `mxfp4`; None for an adapter.
        base: that the export is made for or from.
        adapter: that it is made from.
        updates: norm of each update by tensor; None for an adapter.
        file: name of a merged GGUF file.
        survival: of a merge to MXFP4.
        verification: its outcome.
    """

    written_by: str = f"gpt-oss-finetune {__version__}"
    written: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    target: str
    experts: str | None = None
    base: BaseRecord
    adapter: AdapterOrigin
    updates: Mapping[str, float] | None = None
    file: str | None = None
    survival: Survival | None = None
    verification: Verification | None = None

    @classmethod
    def of(cls, target: str, base: BaseRecord, adapter: AdapterFile) -> ExportRecord:
        """The record of an export that begins."""
        digest = sha256_of(adapter.directory / WEIGHTS)
        origin = AdapterOrigin(str(adapter.directory.resolve()), digest, len(adapter.sites))
        return cls(target=target, base=base, adapter=origin)

    @property
    def is_merged(self) -> bool:
        """Whether the export has the base's weights."""
        return self.experts is not None
