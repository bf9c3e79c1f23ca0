"""Checkpoints of a base, native MXFP4 or bfloat16: everything is checked from headers before a weight is read.

A bfloat16 checkpoint stores its experts dense, `gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D], transposed against
the packed ones. It is presented in the native layout, its experts quantised to MXFP4 as they are read; only its
identity is that of the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.arch import DTYPE_BYTES, Arch, TensorSpec
from finetune.errors import InputError
from finetune.files import read_json
from finetune.model.headers import TensorEntry, join, plain_file_name, read_header
from finetune.mxfp4.format import dequantise, quantise

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CHECKSUMS_FILE = "checksums.json"
_BLOCKS, _SCALES = "_blocks", "_scales"
_TORCH_DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8}
_WIDE = {"F32": "float32", "F16": "float16", "F64": "float64"}
_SINGLE_EXPERT = re.compile(r"\.experts\.(\w+\.)?\d+\.")
_FETCH_AGAIN = "download or copy the checkpoint again"

ConfigJson = dict[str, Any]
"""Content of a config.json: transformers' keys, passed on as they are; `Arch` has those that we read."""


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint directory. `Checkpoint.open` makes one.

    Attributes:
        directory: the directory of its files.
        config: the content of config.json.
        arch: dimensions of the model.
        entries: tensor name -> file, dtype and shape, in the order of the files.
    """

    directory: Path
    config: ConfigJson
    arch: Arch
    entries: dict[str, TensorEntry]
    _files: dict[str, Callable[[str], Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Check a directory from its config, index and shard headers (kilobytes, whatever the model's size).

        Args:
            directory: has config.json and either model.safetensors.index.json with its shards or model.safetensors.

        Returns:
            The checkpoint. One in bfloat16 is a `DenseCheckpoint`, which looks like a native one.

        Raises:
            InputError: not a directory, a file missing, broken or truncated, another architecture, a checkpoint that
                is neither in native MXFP4 nor in bfloat16, or tensors that are missing, unexpected or of another dtype
                or shape.
        """
        if not directory.is_dir():
            raise InputError(
                f"{directory} is not a directory" if directory.exists() else f"there is no directory {directory}",
                fix="give a checkpoint directory; `finetune base tiny DIR` makes a small one",
            )
        config = read_json(
            directory / CONFIG_FILE, "the config.json of a checkpoint", "give a complete checkpoint directory"
        )
        arch = Arch.from_config(config, str(directory / CONFIG_FILE))
        packed = _is_packed(config, directory)
        entries = _read_headers(directory)
        if not packed:
            return DenseCheckpoint.of(directory, config, arch, entries)
        _require_tensors(directory, entries, arch.expected_tensors(), "in native MXFP4")
        return cls(directory, config, arch, entries)

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """The tensors of the files; the identity covers these."""
        return self.entries

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self.entries)

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors writes it: `BF16` or `U8`."""
        return self.entries[name].dtype

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.entries[name].shape

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def read(self, name: str) -> Tensor:
        """Read one tensor, on the CPU.

        Its memory is the mapped file itself: nothing is copied, pages arrive when they are touched and the system may
        drop them again. Do not write to it.

        Args:
            name: one of `names()`.

        Returns:
            The tensor, in its stored dtype and shape.
        """
        return self.read_stored(name)

    def read_stored(self, name: str) -> Tensor:
        """Read one tensor of the files; see `read`."""
        file = self.stored[name].file
        if file not in self._files:
            self._files[file] = safe_open(self.directory / file, framework="pt").get_tensor
        return self._files[file](name)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Read part of a tensor into memory of its own: unlike with `read`, no file stays mapped.

        Args:
            name: one of `names()`.
            first, last: range along the first axis, `last` not included.

        Returns:
            [last - first, ...] in the stored dtype.

        Raises:
            InputError: the file ends before the tensor does.
        """
        entry = self.entries[name]
        row_bytes = entry.num_bytes // entry.shape[0]
        data = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
        path = self.directory / entry.file
        with path.open("rb", buffering=0) as file:
            file.seek(entry.offset + first * row_bytes)
            view, done = data.numpy().data, 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise InputError(f"{path} was cut short while {name} was read", fix=_FETCH_AGAIN)
                done += count
        return data.view(_TORCH_DTYPES[entry.dtype]).reshape(last - first, *entry.shape[1:])


@dataclass(frozen=True)
class DenseCheckpoint(Checkpoint):
    """A bfloat16 checkpoint; `entries`, `read` and `read_rows` present it in the native layout.

    Attributes:
        stored_entries: the tensors of the files.
    """

    stored_entries: dict[str, TensorEntry] = field(default_factory=dict)
    _last: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _rounding: dict[tuple[str, int, int], tuple[float, float]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, directory: Path, config: ConfigJson, arch: Arch, stored: dict[str, TensorEntry]) -> DenseCheckpoint:
        """Check the files' tensors and present them in the native layout.

        Raises:
            InputError: tensors are missing, unexpected or of another dtype or shape.
        """
        if any(name.endswith(_BLOCKS) for name in stored):
            raise InputError(
                f"{directory} has MXFP4 experts, and its {CONFIG_FILE} has no quantization_config",
                fix="use the config.json that was published with the checkpoint",
            )
        _require_tensors(directory, stored, dense_tensors(arch), "in bfloat16")
        entries = {}
        for name, (dtype, shape) in arch.expected_tensors().items():
            file = stored[_dense_name(name)].file
            num_bytes = DTYPE_BYTES[dtype] * math.prod(shape)
            entries[name] = stored.get(name) or TensorEntry(file, dtype, shape, num_bytes, -1)
        return cls(directory, config, arch, entries, stored_entries=stored)

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """The tensors of the files; the identity covers these."""
        return self.stored_entries

    def read(self, name: str) -> Tensor:
        """Read one tensor of the native layout; experts are quantised here."""
        if name in self.stored_entries:
            return self.read_stored(name)
        return self._packed(name, 0, self.arch.num_experts)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Read rows (experts) `first` to `last` of a tensor of the native layout, in memory of their own."""
        if name in self.stored_entries:
            return super().read_rows(name, first, last)
        return self._packed(name, first, last)

    def rounding_error(self) -> float:
        """Relative RMS of the change in the experts quantised so far (0 when they had MXFP4 values already)."""
        lost, total = (sum(sums[part] for sums in self._rounding.values()) for part in (0, 1))
        return math.sqrt(lost / total) if total else 0.0

    def describe_rounding(self) -> str:
        """One line for the log about the experts quantised so far."""
        error = self.rounding_error()
        change = (
            f"rounding changed them by {error:.1%} (relative RMS)" if error else "they had MXFP4 values: nothing lost"
        )
        return (
            f"experts: {self.directory} is in bfloat16, quantised to MXFP4 while reading; {change}. "
            "The adapter is trained over the rounded weights"
        )

    def _packed(self, name: str, first: int, last: int) -> Tensor:
        key = (_dense_name(name), first, last)
        if key not in self._last:
            dense = self.read_stored(key[0])[first:last].mT.contiguous()
            blocks, scales = quantise(dense)
            if key not in self._rounding:
                self._rounding[key] = _squared_sums(dense, blocks, scales)
            self._last.clear()  # blocks and scales of one projection are asked for one after the other
            self._last[key] = (blocks, scales)
        return self._last[key][0 if name.endswith(_BLOCKS) else 1]


def dense_tensors(arch: Arch) -> dict[str, TensorSpec]:
    """Every tensor of a bfloat16 checkpoint: name -> (dtype as safetensors writes it, shape)."""
    tensors: dict[str, TensorSpec] = {}
    for name, (dtype, sizes) in arch.expected_tensors().items():
        if name.endswith(_BLOCKS):
            experts, out, groups, half = sizes
            tensors[_dense_name(name)] = ("BF16", (experts, groups * half * 2, out))
        elif not name.endswith(_SCALES):
            tensors[name] = (dtype, sizes)
    return tensors


def _dense_name(name: str) -> str:
    return name.removesuffix(_BLOCKS).removesuffix(_SCALES)


def _squared_sums(dense: Tensor, blocks: Tensor, scales: Tensor) -> tuple[float, float]:
    """Squared sums of the change by rounding and of the weights, expert after expert."""
    lost = total = 0.0
    for expert in range(len(dense)):
        weights = dense[expert].float()
        lost += float((weights - dequantise(blocks[expert], scales[expert], torch.float32)).square().sum())
        total += float(weights.square().sum())
    return lost, total


def _is_packed(config: ConfigJson, directory: Path) -> bool:
    """Whether experts are in MXFP4; False: in bfloat16."""
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return False
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method != "mxfp4":
        raise InputError(
            f"{directory} is neither in native MXFP4 nor in bfloat16: its {CONFIG_FILE} has quant_method {method!r}",
            why="experts are trained over MXFP4 weights, the published ones or ones quantised from bfloat16",
            fix="use the release that it was made from, such as openai/gpt-oss-20b",
        )
    return True


def _read_headers(directory: Path) -> dict[str, TensorEntry]:
    """Headers of all shards, compared with the index."""
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        if not (directory / SINGLE_FILE).exists():
            raise InputError(
                f"{directory} has neither {INDEX_FILE} nor {SINGLE_FILE}",
                why="the index says which shard has which tensor",
                fix=_FETCH_AGAIN,
            )
        return read_header(directory / SINGLE_FILE)
    weight_map = read_json(index_path, "the index of a checkpoint", _FETCH_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index_path} has no weight_map", fix=_FETCH_AGAIN)
    shards = sorted({plain_file_name(file, index_path) for file in weight_map.values()})
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise InputError(f"{directory} lacks {join(missing)} of its {len(shards)} shards", fix=_FETCH_AGAIN)
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(directory / shard).items():
            if weight_map.get(name) != shard:
                place = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise InputError(f"{directory / shard} has {name}, and the index {place}", fix=_FETCH_AGAIN)
            entries[name] = entry
    if absent := sorted(weight_map.keys() - entries.keys()):
        raise InputError(f"{index_path} lists tensors that are in no shard: {join(absent)}", fix=_FETCH_AGAIN)
    return entries


def _require_tensors(
    directory: Path, entries: dict[str, TensorEntry], expected: dict[str, TensorSpec], layout: str
) -> None:
    """Compare the tensors of a checkpoint with those it should have.

    Args:
        directory, entries: the checkpoint and its tensors.
        expected: name -> dtype and shape.
        layout: of the expected ones, such as "in native MXFP4".

    Raises:
        InputError: names the differences.
    """
    _refuse_single_experts(directory, entries, expected)
    problems = [*_named("missing", expected.keys() - entries.keys()), *_named("unexpected", entries.keys() - expected)]
    differing = [name for name in expected if name in entries and _spec(entries[name]) != expected[name]]
    if not problems and differing and all(_is_only_wider(entries[name], expected[name]) for name in differing):
        kinds = " and ".join(sorted({_WIDE[entries[name].dtype] for name in differing}))
        raise InputError(
            f"{directory} is in {kinds}: {len(differing):,} of its {len(expected):,} tensors, such as {differing[0]}",
            why="gpt-oss is published in bfloat16, and a base is read as it is, never rounded in silence",
            fix="cast these tensors to bfloat16 (safetensors.torch: load_file, tensor.to(torch.bfloat16), save_file)",
        )
    for name in differing:
        (dtype, sizes), found = expected[name], entries[name]
        problems.append(f"{name} is {found.dtype} {list(found.shape)}, not {dtype} {list(sizes)}")
    if problems:
        raise InputError(
            f"{directory} does not have the tensors that its {CONFIG_FILE} describes: {join(problems, limit=4)}",
            why="a missing tensor would be random, an unexpected one would be left out",
            fix=f"use the config.json and shards of one and the same release {layout}",
        )


def _refuse_single_experts(directory: Path, entries: dict[str, TensorEntry], expected: dict[str, TensorSpec]) -> None:
    single = sorted(name for name in entries.keys() - expected if _SINGLE_EXPERT.search(name))
    if single:
        raise InputError(
            f"{directory} stores every expert in tensors of its own, such as {single[0]}",
            why="the published checkpoints and transformers stack a layer's experts in one tensor",
            fix="use the release that it was made from, or stack them: gate_up_proj [E, D, 2F], down_proj [E, F, D]",
        )


def _spec(entry: TensorEntry) -> TensorSpec:
    return entry.dtype, entry.shape


def _is_only_wider(entry: TensorEntry, expected: TensorSpec) -> bool:
    """Whether a tensor is the expected one in float32 or float16."""
    return expected[0] == "BF16" and entry.dtype in _WIDE and entry.shape == expected[1]


def _named(kind: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    return [f"{kind} {join(ordered)}"] if ordered else []
