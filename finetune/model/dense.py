"""A gpt-oss checkpoint in bfloat16, seen as a native one: its experts are rounded to MXFP4 as they are read.

There experts are dense, `gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D], transposed against the packed ones.
Everything that reads a base finds packed tensors under their native names; only its identity is that of the files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.errors import InputError
from finetune.model.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, require_tensors
from finetune.model.headers import TensorEntry
from finetune.model.shapes import ModelShape
from finetune.mxfp4.format import dequantise, quantise

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
        cls, directory: Path, config: dict[str, Any], shape: ModelShape, stored: dict[str, TensorEntry]
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


def dense_tensors(shape: ModelShape) -> dict[str, tuple[str, tuple[int, ...]]]:
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
