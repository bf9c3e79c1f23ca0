"""A base as it is held, written for others' code to load: what an adapter over rounded weights was trained over.

The result is a bfloat16 checkpoint in transformers' layout. Every storage fits into it exactly: MXFP4 values are
bfloat16 numbers, and NF4 ones are rounded to bfloat16 wherever they are used.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.errors import MachineError
from finetune.model.build import Base
from finetune.model.checkpoint import CONFIG_FILE, INDEX_FILE, dense_tensors
from finetune.model.nf4 import dequantise_nf4


def write_dense(base: Base, directory: Path) -> None:
    """Write the live base's weights, without its adapter, one file a layer.

    Args:
        base: any storage, with or without an adapter attached.
        directory: must exist.

    Raises:
        MachineError: not enough free disk.
    """
    shape = base.checkpoint.shape
    wanted = dense_tensors(shape)
    needed, free = sum(2 * math.prod(size) for _, size in wanted.values()), shutil.disk_usage(directory).free
    if needed > free:
        raise MachineError(
            f"the base as it is held takes {needed / 2**30:.1f} GiB in {directory}, {free / 2**30:.1f} GiB are free",
            fix="point TMPDIR at a larger disk",
        )
    settings = {key: value for key, value in base.checkpoint.config.items() if key != "quantization_config"}
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    files: dict[str, list[str]] = {}
    for name in wanted:
        parts = name.split(".")
        file = f"layer-{parts[2]}.safetensors" if parts[1] == "layers" else "rest.safetensors"
        files.setdefault(file, []).append(name)
    state = base.model.state_dict()
    for file, names in files.items():
        tensors = {name: _dense(base, state, name).contiguous() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) + "\n")


def _dense(base: Base, state: dict[str, Tensor], name: str) -> Tensor:
    """One tensor of the bfloat16 layout, on the CPU; experts [E, in, out]."""
    layer, _, projection = name.rpartition(".mlp.experts.")
    if layer and not name.endswith("_bias"):
        experts = base.model.get_submodule(f"{layer}.mlp.experts").projection(projection)
        held: Tensor = experts.dequantised(0, base.checkpoint.shape.num_experts, torch.bfloat16)
        return held.mT.cpu()
    tensor = state[name]
    if tensor.dtype == torch.uint8:
        tensor = dequantise_nf4(tensor, state[f"{name}_scales"], torch.bfloat16)
    return tensor.bfloat16().cpu().clone()
