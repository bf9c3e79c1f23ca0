"""Records of compensated rounding: one report per expert, one result per layer, and the rounded tensors on disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.files import sha256_of
from finetune.resumable import ResumableDirectory
from finetune.rounding.merge import Tally

ROUNDED = "rounded"


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """One expert's rounding. The figures after `state` apply to rounded experts only.

    Attributes:
        expert: its number.
        tokens: calibration tokens that the router sent it.
        state: `rounded`, or `untouched: ` and why.
        borrowed: it had fewer tokens than inputs, so its moments were shrunk to the layer's.
        singular: its moments needed more damping.
        wanted: mean square of the wanted change of outputs, times what the expert counts in the layer.
        amplification: factor on the update before rounding.
        projection: of the written change of outputs on the wanted one; 1 is all of it.
        error: norm of the difference relative to the wanted one's.
    """

    expert: int
    tokens: int
    state: str
    borrowed: bool = False
    singular: bool = False
    wanted: float = 0.0
    amplification: float = 1.0
    projection: float = 0.0
    error: float = 0.0

    @property
    def is_rounded(self) -> bool:
        """Whether its weights were rounded anew."""
        return self.state == ROUNDED

    def as_json(self) -> dict[str, Any]:
        """The form in export.json and progress.json, where `tokens` is called `rows`."""
        figures = asdict(self)
        record = {"expert": figures.pop("expert"), "rows": figures.pop("tokens"), "state": figures.pop("state")}
        return record | (figures if self.is_rounded else {})

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ExpertReport:
        """Read what `as_json` wrote."""
        figures = dict(record)
        return cls(tokens=figures.pop("rows"), **figures)


@dataclass
class LayerResult:
    """The rounded experts of one layer.

    Attributes:
        tensors: by their names in the checkpoint: `..._blocks`, `..._scales`, `..._bias` of each projection with an
            update.
        tallies: sums over the weights by the name of the blocks, and over the biases by theirs (`wanted`: how far
            they were moved).
        experts: one report per expert, by projection.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    experts: dict[str, list[ExpertReport]] = field(default_factory=dict)


class RoundedExperts:
    """Rounded tensors, in files of their own until the export has copied them.

    Args:
        directory: of the files, one per layer, which survive an interruption.

    Attributes:
        tallies: sums over weights and biases of all finished layers, see `LayerResult`.
        experts: reports by projection, such as `model.layers.0.mlp.experts.down_proj`.
    """

    def __init__(self, directory: ResumableDirectory) -> None:
        self.directory = directory
        self.tallies: dict[str, Tally] = {}
        self.experts: dict[str, list[ExpertReport]] = {}
        for record in directory.files.values():
            self._remember(record)

    @classmethod
    def beside(cls, out: Path, key: str) -> RoundedExperts:
        """The rounded layers of an export to `out`; finished ones of the same key are kept."""
        return cls(ResumableDirectory(out.with_name(f"{out.name}.rounded"), key))

    def has(self, layer: int) -> bool:
        """Whether a layer is finished."""
        return _file_name(layer) in self.directory.files

    def add(self, layer: int, result: LayerResult) -> None:
        """Write a finished layer."""
        path = self.directory.unfinished(_file_name(layer))
        save_file(result.tensors, path)
        record = {
            "sha256": sha256_of(path),
            "tallies": {name: asdict(tally) for name, tally in result.tallies.items()},
            "experts": {name: [report.as_json() for report in reports] for name, reports in result.experts.items()},
        }
        self.directory.finish(_file_name(layer), record)
        self._remember(record)

    def read(self, name: str) -> Tensor:
        """A tensor under its name in the checkpoint."""
        return self._open(name).get_tensor(name)

    def read_experts(self, name: str, first: int, last: int) -> Tensor:
        """Some experts of a tensor."""
        return self._open(name).get_slice(name)[first:last]

    def discard(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.directory.path, ignore_errors=True)

    def describe(self) -> list[str]:
        """One line per projection and reason for experts that were left alone or rounded with less information."""
        lines = []
        for name, reports in self.experts.items():
            kinds: dict[str, list[int]] = {}
            for report in reports:
                if not report.is_rounded:
                    kinds.setdefault(report.state, []).append(report.expert)
                elif report.singular:
                    kinds.setdefault("rounded with more damping: singular moments", []).append(report.expert)
                elif report.borrowed:
                    reason = "rounded with moments shrunk to the layer's: few tokens"
                    kinds.setdefault(reason, []).append(report.expert)
            lines += [f"{name}: {kind}: experts {', '.join(map(str, numbers))}" for kind, numbers in kinds.items()]
        return lines

    def progress(self, layer: int) -> str:
        """A layer's mean projection, for the progress line."""
        record = self.directory.files.get(_file_name(layer))
        if record is None:
            return f"layer {layer}"
        reports = [ExpertReport.from_json(report) for reports in record["experts"].values() for report in reports]
        done = [report.projection for report in reports if report.is_rounded]
        return f"layer {layer}: mean projection {sum(done) / max(1, len(done)):.3f} of {len(done)} expert matrices"

    def _remember(self, record: Mapping[str, Any]) -> None:
        self.tallies |= {name: Tally(**sums) for name, sums in record["tallies"].items()}
        for name, reports in record["experts"].items():
            self.experts[name] = [ExpertReport.from_json(report) for report in reports]

    def _open(self, name: str) -> Any:
        return safe_open(self.directory.path / _file_name(int(name.split(".")[2])), framework="pt")


def _file_name(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"
