"""Exports of a run with selected experts, ranks by use and fully trained routers, by the command (slow test)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import Train
from torch import Tensor

from finetune.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture
def run(train: Train) -> Path:
    code, directory = train(
        "adapter.experts.select=top_k=4", "adapter.experts.rank_by=gate", "adapter.router.mode=full",
        "trainer.max_steps=4", "logging.tracker=tensorboard", "logging.mode=offline", "evaluate.routing_examples=4",
    )  # fmt: skip
    assert code == 0
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
def test_merges_include_the_chosen_experts_and_the_router_biases(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    import gguf

    for target in ("bf16", "gguf", "mxfp4"):
        assert main(["export", str(run), "--to", target, "--out", str(tmp_path / target)]) == 0
    base, merged, packed = (tensors_of(directory) for directory in (tiny_base, tmp_path / "bf16", tmp_path / "mxfp4"))
    changes = json.loads((run / "adapter" / "router_bias.json").read_text())
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model-bf16.gguf").tensors}
    chosen = json.loads((run / "experts.json").read_text())
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.router.bias"
        wanted = base[name].float() + torch.tensor(changes[name])
        in_gguf = np.array(found[f"blk.{layer}.ffn_gate_inp.bias"].data)
        for bias in (merged[name], packed[name], torch.from_numpy(in_gguf)):
            torch.testing.assert_close(bias.float(), wanted, rtol=2**-8, atol=0)
        assert (wanted - base[name].float()).abs().max() > 1e-3, "control: the change is there to be missed"
        ranks = chosen["ranks"][str(layer)]
        with_rank = [e for e, rank in zip(chosen["selected"][str(layer)], ranks, strict=True) if rank]
        key = f"model.layers.{layer}.mlp.experts.down_proj_blocks"
        moved = (base[key] != packed[key]).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert set(moved) <= set(with_rank) and moved, "experts without an update keep their bytes"


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_the_trackers_file_has_the_heat_maps(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["expert_usage_before", "expert_usage_after"]
    for when in ("before", "after"):
        (image,) = events.Images(f"expert_usage_{when}")
        assert image.step == 4 and image.encoded_image_string.startswith(b"\x89PNG")
        assert image.width % 8 == 0 and image.height % 2 == 0, "8 experts across, 2 layers down"
