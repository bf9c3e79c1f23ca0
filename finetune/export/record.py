"""What export.json records of an export, as classes with fields; `as_json` gives the file's form."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from finetune import __version__
from finetune.adapters.store import WEIGHTS, AdapterFile, BaseRecord
from finetune.files import sha256_of

if TYPE_CHECKING:
    from finetune.export.survival.weights import Survival


@dataclass(frozen=True)
class Skipped:
    """A check that was not made."""

    reason: str

    def as_json(self) -> dict[str, str]:
        """As export.json has it."""
        return {"skipped": self.reason}


@dataclass(frozen=True)
class Failed:
    """A check that failed."""

    what: str

    def as_json(self) -> dict[str, str]:
        """As export.json has it."""
        return {"failed": self.what}


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

    def as_json(self) -> dict[str, Any]:
        """As export.json has it."""
        return asdict(self)


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
        adapted: against the live base + adapter.
        base: against the plain base.
        merged: against our own reader of the files; for MXFP4 only.
        limit: of the difference to `merged` that rounding explains (`finetune.model.noise`).
    """

    samples: int
    dtype: str
    adapted: LogitsDistance
    base: LogitsDistance
    merged: LogitsDistance | None = None
    limit: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As export.json has it."""
        record: dict[str, Any] = {"samples": self.samples, "dtype": self.dtype}
        record |= ({"limit": self.limit} if self.limit is not None else {}) | {"problems": {}}
        distances = {"adapted": self.adapted, "base": self.base, "merged": self.merged}
        return record | {name: asdict(found) for name, found in distances.items() if found is not None}


@dataclass(frozen=True)
class MergeCheck:
    """The verification of a merged checkpoint."""

    weights: WeightsCheck
    logits: LogitsCheck | Skipped

    def as_json(self) -> dict[str, Any]:
        """As export.json has it."""
        return {"weights": asdict(self.weights), "logits": self.logits.as_json()}


Verification = AdapterCheck | MergeCheck | Skipped | Failed


@dataclass(frozen=True)
class AdapterOrigin:
    """The adapter that an export is made from: its directory, the SHA-256 of its weights, and its number of sites."""

    directory: str
    sha256: str
    sites: int


@dataclass
class ExportRecord:
    """export.json; filled while the export goes on.

    Attributes:
        target: of the export.
        base: that the export is made for or from.
        adapter: that it is made from.
        written: date and time.
        experts: how a merge stores experts, `bf16` or `mxfp4`; None for an adapter.
        updates: norm of each update by tensor; None for an adapter.
        file: name of a merged GGUF file.
        survival: of a merge to MXFP4.
        verification: its outcome.
    """

    target: str
    base: BaseRecord
    adapter: AdapterOrigin
    written: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    experts: str | None = None
    updates: Mapping[str, float] | None = None
    file: str | None = None
    survival: Survival | None = None
    verification: Verification | None = None

    @classmethod
    def of(cls, target: str, base: BaseRecord, adapter: AdapterFile) -> ExportRecord:
        """The record of an export that begins."""
        digest = sha256_of(adapter.directory / WEIGHTS)
        return cls(target, base, AdapterOrigin(str(adapter.directory.resolve()), digest, len(adapter.sites)))

    @property
    def is_merged(self) -> bool:
        """Whether the export has the base's weights."""
        return self.experts is not None

    @property
    def written_by(self) -> str:
        """This tool and its version."""
        return f"gpt-oss-finetune {__version__}"

    def as_json(self) -> dict[str, Any]:
        """As export.json has it, but for the hashes of the files."""
        record: dict[str, Any] = {"written_by": self.written_by, "written": self.written, "target": self.target}
        if self.experts is not None:
            record["experts"] = self.experts
        record |= {"base": self.base.as_json(), "adapter": asdict(self.adapter)}
        optional = {
            "updates": self.updates and dict(self.updates),
            "file": self.file,
            "survival": self.survival and self.survival.as_json(),
            "verification": self.verification and self.verification.as_json(),
        }
        return record | {name: value for name, value in optional.items() if value is not None}
