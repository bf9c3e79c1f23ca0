"""Open a gpt-oss checkpoint in the published layout: everything is checked from headers before a weight is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune import log
from finetune.arch import Arch
from finetune.errors import InputError
from finetune.files import sha256_of
from finetune.machine import num_cores
from finetune.model.headers import TensorEntry, join, plain_file_name, read_header, read_json
from finetune.mxfp4.format import dequantise, quantise

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CHECKSUMS_FILE = "checksums.json"
_TORCH_DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FETCH_AGAIN = "download or copy the checkpoint again"


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint directory. Make one with `Checkpoint.open`.

    Attributes:
        directory: where it lies.
        config: config.json as it is.
        shape: the model's sizes.
        entries: tensor name -> file, dtype and shape, in the order of the files.
    """

    directory: Path
    config: dict[str, Any]
    shape: Arch
    entries: dict[str, TensorEntry]
    _files: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Check a directory from its config, index and shard headers (kilobytes, whatever the model's size).

        Args:
            directory: holds config.json and either model.safetensors.index.json with its shards or model.safetensors.

        Raises:
            InputError: not a directory, a file missing, broken or truncated, another architecture, a checkpoint that
                is neither in native MXFP4 nor in bfloat16, or tensors that are missing, unexpected or of another dtype
                or shape.

        Returns:
            The checkpoint. One in bfloat16 is a `DenseCheckpoint`, which looks like a native one.
        """
        if not directory.is_dir():
            raise InputError(
                f"{directory} is not a directory" if directory.exists() else f"there is no directory {directory}",
                fix="give a checkpoint directory; `finetune base tiny DIR` makes a small one",
            )
        config = read_json(directory / CONFIG_FILE)
        shape = Arch.from_config(config, str(directory / CONFIG_FILE))
        packed = _is_packed(config, directory)
        entries = _read_headers(directory)
        if not packed:
            return DenseCheckpoint.of(directory, config, shape, entries)
        require_tensors(directory, entries, shape.expected_tensors(), "in native MXFP4")
        return cls(directory, config, shape, entries)

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """Tensors as they lie in the files; what the identity covers."""
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

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU.

        Its memory is the mapped file itself: nothing is copied, pages arrive when they are touched and the system may
        drop them again. Do not write to it.

        Args:
            name: one of `names()`.

        Returns:
            The tensor, in its stored dtype and shape.
        """
        return self.read_stored(name)

    def read_stored(self, name: str) -> torch.Tensor:
        """Read one tensor as it lies in the files; see `read`."""
        file = self.stored[name].file
        if file not in self._files:
            self._files[file] = safe_open(self.directory / file, framework="pt")
        tensor: torch.Tensor = self._files[file].get_tensor(name)
        return tensor

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read part of a tensor into memory of its own: unlike `read`, nothing stays mapped behind it.

        Args:
            name: one of `names()`.
            first, last: rows along the first axis, `last` not included.

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

    def verify_checksums(self, progress: log.Progress | None = None) -> bool:
        """Compare the files with `checksums.json`, or with the names that the hub's cache gives them.

        The cache keeps a large file as a blob named by its sha256, and the snapshot links to it.

        Args:
            progress: moved on in MiB; its total is set here.

        Returns:
            Whether there was something to compare with. Published checkpoints carry no checksums.json, so a copy of
            one outside the hub's cache has nothing.

        Raises:
            InputError: a file differs or is missing, or checksums.json is not readable.
        """
        path = self.directory / CHECKSUMS_FILE
        shards = {entry.file for entry in self.stored.values()}
        listed = _read_checksums(path) if path.exists() else _cached_digests(self.directory, shards)
        if not listed:
            return False
        if unlisted := sorted(shards - listed.keys()):
            raise InputError(f"{path} does not list {join(unlisted)}", fix=_FETCH_AGAIN)
        if missing := sorted(name for name in listed if not (self.directory / name).is_file()):
            raise InputError(f"{self.directory} lacks {join(missing)}, which {CHECKSUMS_FILE} lists", fix=_FETCH_AGAIN)
        sizes = {name: (self.directory / name).stat().st_size for name in listed}
        if progress is not None:
            progress.total = sum(sizes.values()) >> 20
        done, wrong = 0, []
        # hashlib lets go of the interpreter lock, so that files are hashed side by side.
        with ThreadPoolExecutor(max_workers=min(8, num_cores())) as pool:
            jobs = {pool.submit(sha256_of, self.directory / name): name for name in listed}
            for job in as_completed(jobs):
                name = jobs[job]
                done += sizes[name]
                if job.result() != listed[name]:
                    wrong.append(name)
                if progress is not None:
                    progress.show(done >> 20, name)
        if wrong:
            source, fix = f"{CHECKSUMS_FILE} lists", f"{_FETCH_AGAIN}; if the change was meant, remove {CHECKSUMS_FILE}"
            if not path.exists():
                source, fix = "the hub's cache names it by", f"remove {self.directory} and download it again"
            raise InputError(
                f"{self.directory}: {join(sorted(wrong))} does not have the sha256 that {source}",
                why="it was bit-flipped or replaced since the checkpoint was written",
                fix=fix,
            )
        return True


def _cached_digests(directory: Path, files: Iterable[str]) -> dict[str, str]:
    """sha256 of the files that are links to blobs of the hub's cache, which are named by it; {} unless all are."""
    digests = {file: (directory / file).resolve().name for file in files if (directory / file).is_symlink()}
    named = len(digests) == len(set(files)) and all(_SHA256.fullmatch(digest) for digest in digests.values())
    return digests if named else {}


def _read_checksums(path: Path) -> dict[str, str]:
    content = read_json(path)
    files = content.get("files")
    if content.get("algorithm") != "sha256" or not isinstance(files, dict) or not files:
        raise InputError(f'{path} is not {{"algorithm": "sha256", "files": {{name: digest}}}}', fix=_FETCH_AGAIN)
    return {plain_file_name(name, path): str(digest) for name, digest in files.items()}


def _is_packed(config: dict[str, Any], directory: Path) -> bool:
    """Whether experts are in MXFP4; False: in bfloat16."""
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return False
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method != "mxfp4":
        raise InputError(
            f"{directory} is neither in native MXFP4 nor in bfloat16: its {CONFIG_FILE} has quant_method {method!r}",
            why="experts are trained over MXFP4 weights, the published ones or ones rounded from bfloat16",
            fix="use the release that it was made from, such as openai/gpt-oss-20b",
        )
    return True


def _read_headers(directory: Path) -> dict[str, TensorEntry]:
    """Headers of all shards, and that they hold what the index says."""
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        if not (directory / SINGLE_FILE).exists():
            raise InputError(
                f"{directory} has neither {INDEX_FILE} nor {SINGLE_FILE}",
                why="the index says which shard holds which tensor",
                fix=_FETCH_AGAIN,
            )
        return read_header(directory / SINGLE_FILE)
    weight_map = read_json(index_path).get("weight_map")
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
                raise InputError(f"{directory / shard} holds {name}, and the index {place}", fix=_FETCH_AGAIN)
            entries[name] = entry
    if absent := sorted(weight_map.keys() - entries.keys()):
        raise InputError(f"{index_path} lists tensors that no shard holds: {join(absent)}", fix=_FETCH_AGAIN)
    return entries


def require_tensors(
    directory: Path,
    entries: dict[str, TensorEntry],
    expected: dict[str, tuple[str, tuple[int, ...]]],
    layout: str,
) -> None:
    """Compare the tensors of a checkpoint with those it should hold.

    Args:
        directory, entries: the checkpoint and what it holds.
        expected: name -> dtype and shape.
        layout: what the expected ones are, such as "in native MXFP4".

    Raises:
        InputError: names what differs.
    """
    problems = [*_named("missing", expected.keys() - entries.keys()), *_named("unexpected", entries.keys() - expected)]
    for name in expected:
        if name in entries and (entries[name].dtype, entries[name].shape) != expected[name]:
            dtype, sizes = expected[name]
            problems.append(f"{name} is {entries[name].dtype} {list(entries[name].shape)}, not {dtype} {list(sizes)}")
    if problems:
        raise InputError(
            f"{directory} does not hold the tensors that its {CONFIG_FILE} describes: {join(problems, limit=4)}",
            why="a tensor that is missing would be random, one that is unexpected would be left out",
            fix=f"use the config.json and shards of one and the same release {layout}",
        )


def _named(kind: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    return [f"{kind} {join(ordered)}"] if ordered else []


# A gpt-oss checkpoint in bfloat16, seen as a native one: its experts are rounded to MXFP4 as they are read.
#
# There experts are dense, `gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D], transposed against the packed ones.
# Everything that reads a base finds packed tensors under their native names; only its identity is that of the files.

_BLOCKS, _SCALES = "_blocks", "_scales"
# The published checkpoints' own setting; transformers reads it to know what is packed.
_QUANTISATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


@dataclass(frozen=True)
class DenseCheckpoint(Checkpoint):
    """A bfloat16 checkpoint; `entries`, `read` and `read_rows` show the native layout.

    Attributes:
        stored_entries: tensors as they lie in the files.
    """

    stored_entries: dict[str, TensorEntry] = field(default_factory=dict)
    _last: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _rounding: dict[tuple[str, int, int], tuple[float, float]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, directory: Path, config: dict[str, Any], shape: Arch, stored: dict[str, TensorEntry]
    ) -> DenseCheckpoint:
        """Check the files' tensors and show them in the native layout.

        Raises:
            InputError: tensors are missing, unexpected or of another dtype or shape.
        """
        expected = shape.expected_tensors()
        if any(name.endswith(_BLOCKS) for name in stored):
            raise InputError(
                f"{directory} holds MXFP4 experts, and its {CONFIG_FILE} has no quantization_config",
                fix="use the config.json that was published with the checkpoint",
            )
        require_tensors(directory, stored, dense_tensors(shape), "in bfloat16")
        sizes = {"U8": 1, "BF16": 2}
        entries = {}
        for name, (dtype, tensor_shape) in expected.items():
            file = stored[_dense_name(name)].file
            num_bytes = sizes[dtype] * math.prod(tensor_shape)
            entries[name] = stored.get(name) or TensorEntry(file, dtype, tensor_shape, num_bytes, -1)
        return cls(directory, config, shape, entries, stored_entries=stored)

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """Tensors as they lie in the files; what the identity covers."""
        return self.stored_entries

    def read(self, name: str) -> Tensor:
        """Read one tensor of the native layout; experts' blocks and scales are rounded here."""
        if name in self.stored_entries:
            return self.read_stored(name)
        return self._packed(name, 0, self.shape.num_experts)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Read rows (experts) `first` to `last` of a tensor of the native layout, in memory of their own."""
        if name in self.stored_entries:
            return super().read_rows(name, first, last)
        return self._packed(name, first, last)

    def rounding_error(self) -> float:
        """Relative RMS of what rounding changed in the experts read so far (0 when they were MXFP4 values already)."""
        lost, total = (sum(sums[part] for sums in self._rounding.values()) for part in (0, 1))
        return math.sqrt(lost / total) if total else 0.0

    def describe_rounding(self) -> str:
        """What a person should know about the experts read so far."""
        error = self.rounding_error()
        change = (
            f"rounding changed them by {error:.1%} (relative RMS)" if error else "they were MXFP4 values: nothing lost"
        )
        return (
            f"experts: {self.directory} holds bfloat16, quantised to MXFP4 while reading; {change}. "
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


def dense_tensors(shape: Arch) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a bfloat16 checkpoint: name -> (dtype as safetensors writes it, shape)."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, sizes) in shape.expected_tensors().items():
        if name.endswith(_BLOCKS):
            experts, out, groups, half = sizes
            tensors[_dense_name(name)] = ("BF16", (experts, groups * half * 2, out))
        elif not name.endswith(_SCALES):
            tensors[name] = (dtype, sizes)
    return tensors


def native_config(config: dict[str, Any]) -> dict[str, Any]:
    """A bfloat16 checkpoint's config.json with what says that experts are packed."""
    return {**config, "quantization_config": _QUANTISATION}


def write_native(checkpoint: DenseCheckpoint, directory: Path) -> None:
    """Write the rounded base as a native MXFP4 checkpoint, one shard a layer: others' code then computes with it too.

    Args:
        checkpoint: the bfloat16 one.
        directory: must exist.
    """
    (directory / CONFIG_FILE).write_text(json.dumps(native_config(checkpoint.config), indent=2) + "\n")
    shards: dict[str, list[str]] = {}
    for name in checkpoint.names():
        parts = name.split(".")
        shard = f"layer-{parts[2]}.safetensors" if parts[1] == "layers" else "rest.safetensors"
        shards.setdefault(shard, []).append(name)
    for shard, names in shards.items():
        save_file({name: checkpoint.read(name).clone() for name in names}, directory / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) + "\n")


def _dense_name(name: str) -> str:
    return name.removesuffix(_BLOCKS).removesuffix(_SCALES)


def _squared_sums(dense: Tensor, blocks: Tensor, scales: Tensor) -> tuple[float, float]:
    """Squared sums of what rounding changed and of the weights, expert by expert."""
    lost = total = 0.0
    for expert in range(len(dense)):
        weights = dense[expert].float()
        lost += float((weights - dequantise(blocks[expert], scales[expert], torch.float32)).square().sum())
        total += float(weights.square().sum())
    return lost, total
