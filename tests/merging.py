"""A base small enough for everything, an adapter that changes it by some per cent, and exports made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapters.attach import attach_adapter
from finetune.adapters.provenance import PROVENANCE, BaseRecord
from finetune.adapters.store import WEIGHTS, write_adapter
from finetune.cli.main import main
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig
from finetune.model.build import build_base
from finetune.model.checkpoint import Checkpoint

ADAPTER = AdapterConfig(
    attention=AttentionAdapterConfig(rank=6, alpha=12.0), experts=ExpertAdapterConfig(rank=3, alpha=5.0)
)
VOCABULARY = 512
IDS = torch.randint(500, (40,), generator=torch.Generator().manual_seed(3)).tolist()
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="session")
def small_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with the first 512 tokens only: GGUF packs and reads every token and merge in Python."""
    directory = tmp_path_factory.mktemp("bases") / "small"
    shutil.copytree(tiny_base, directory)
    (directory / "checksums.json").unlink()
    for number, name in ((1, "model.embed_tokens.weight"), (3, "lm_head.weight")):
        shard = directory / f"model-0000{number}-of-00003.safetensors"
        tensors = load_file(shard)
        tensors[name] = tensors[name][:VOCABULARY].clone()
        save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"vocab_size": VOCABULARY, "eos_token_id": 500, "pad_token_id": 501}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < 500}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    tokenizer["added_tokens"] = [
        entry | {"id": 500 + place} for place, entry in enumerate(tokenizer["added_tokens"]) if place < 3
    ]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture(scope="session", name="adapter")
def merge_adapter(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes weights by some per cent."""
    base = build_base(Checkpoint.open(small_base), torch.device("cpu"), torch.float32, experts_per_chunk=8)
    live = attach_adapter(base, ADAPTER, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in live.parameters().items():
            if name.endswith("b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    directory = tmp_path_factory.mktemp("merge") / "adapter"
    write_adapter(directory, live, ADAPTER, BaseRecord(str(small_base), None, base.identity))
    return directory


@pytest.fixture(scope="session")
def exported(adapter: Path) -> Callable[[str], Path]:
    """Directories of the targets, each exported once, through the command line, verification included."""

    def export(target: str, *extra: str) -> Path:
        out = adapter.with_name("-".join([target, *extra]))
        rounds = "mxfp4" in (target, *extra) and "--rounding" not in extra
        if not out.exists():
            extra = (*extra, "--rounding", "nearest") if rounds else extra
            assert main(["export", str(adapter), "--to", target, "--out", str(out), *extra]) == 0
        return out

    return export


def without_provenance(adapter: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy with other tensors and no record of what was written."""
    shutil.copytree(adapter, to)
    (to / PROVENANCE).unlink()
    tensors = load_file(to / WEIGHTS)
    change(tensors)
    save_file(tensors, to / WEIGHTS)
    return to


def zero_b(tensors: dict[str, torch.Tensor]) -> None:
    for key in tensors:
        if "lora_B" in key:
            tensors[key] = torch.zeros_like(tensors[key])
