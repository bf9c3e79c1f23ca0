"""Write a base as third-party code can load it: the weights that an adapter over rounded weights was trained over.

`write_native` writes the MXFP4 weights that a bfloat16 checkpoint was quantised to. `write_dense` writes a live base in
transformers' bfloat16 layout, which represents every storage format exactly: MXFP4 values are bfloat16 numbers, and NF4
ones are rounded to bfloat16 wherever they are used.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.errors import MachineError
from finetune.model.build import Base
from finetune.model.checkpoint import CONFIG_FILE, INDEX_FILE, ConfigJson, DenseCheckpoint, dense_tensors
from finetune.model.nf4 import dequantise_nf4

# The published checkpoints' own setting; transformers reads it to know which weights are packed.
_QUANTISATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def write_native(checkpoint: DenseCheckpoint, directory: Path) -> None:
    """Write a bfloat16 checkpoint's quantised weights as a native MXFP4 checkpoint, one file per layer.

    Args:
        checkpoint: the bfloat16 one.
        directory: must exist.
    """
    config = {**checkpoint.config, "quantization_config": _QUANTISATION}
    _write_checkpoint(directory, config, checkpoint.names(), lambda name: checkpoint.read(name).clone())


def write_dense(base: Base, directory: Path) -> None:
    """Write a live base's weights, without its adapter, as a bfloat16 checkpoint, one file per layer.

    Args:
        base: in any storage format, with or without an adapter attached.
        directory: must exist.

    Raises:
        MachineError: not enough free disk.
    """
    wanted = dense_tensors(base.checkpoint.arch)
    needed, free = sum(2 * math.prod(size) for _, size in wanted.values()), shutil.disk_usage(directory).free
    if needed > free:
        raise MachineError(
            f"the base in bfloat16 takes {needed / 2**30:.1f} GiB in {directory}, {free / 2**30:.1f} GiB are free",
            fix="point TMPDIR at a larger disk",
        )
    config = {key: value for key, value in base.checkpoint.config.items() if key != "quantization_config"}
    state = base.model.state_dict()
    _write_checkpoint(directory, config, wanted, lambda name: _dense(base, state, name).contiguous())


def _write_checkpoint(directory: Path, config: ConfigJson, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
    """Write config.json, one file per layer and one for the rest, and the index; a file's tensors are read together."""
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    files: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        file = f"layer-{parts[2]}.safetensors" if parts[1] == "layers" else "rest.safetensors"
        files.setdefault(file, []).append(name)
    for file, of_file in files.items():
        save_file({name: read(name) for name in of_file}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, of_file in files.items() for name in of_file}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) + "\n")


def _dense(base: Base, state: dict[str, Tensor], name: str) -> Tensor:
    """One tensor of the bfloat16 layout, on the CPU; experts [E, in, out]."""
    layer, _, projection = name.rpartition(".mlp.experts.")
    if layer and not name.endswith("_bias"):
        experts = base.model.get_submodule(f"{layer}.mlp.experts").projection(projection)
        weights: Tensor = experts.dequantised(0, base.checkpoint.arch.num_experts, torch.bfloat16)
        return weights.mT.cpu()
    tensor = state[name]
    if tensor.dtype == torch.uint8:
        tensor = dequantise_nf4(tensor, state[f"{name}_scales"], torch.bfloat16)
    return tensor.bfloat16().cpu().clone()
