"""Bases with random weights made in memory, on the device: the published shapes, and small ones for a CPU."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from finetune.arch import Arch
from finetune.config.paths import shipped_dir
from finetune.model.attention import register_attention, replace_model_parts
from finetune.model.build import Base
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import PackedExperts
from finetune.model.storage import CpuEmbedding, ExpertStorage
from finetune.model.tiny import SIZES
from finetune.mxfp4.format import dequantise

_FP4_RMS = 2.92  # of the 16 values, each as likely as the others
_SMALL = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 32,
    "vocab_size": 8192,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("gpt-oss-20b", SIZES),
    "small": ("gpt-oss-20b", _SMALL),
    "20b": ("gpt-oss-20b", {}),
    "120b": ("gpt-oss-120b", {}),
}


def config_of(name: str) -> dict[str, Any]:
    """config.json's content of a shape."""
    published, changes = SHAPES[name]
    text = (shipped_dir("data") / "tokenizer" / published / "config.json").read_text(encoding="utf-8")
    return {**json.loads(text), **changes}


def random_base(
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    experts_per_chunk: int,
    *,
    embedding_on_cpu: bool = False,
) -> Base:
    """A frozen base with packed experts, every tensor drawn on `device`; nothing touches a disk."""
    shape = Arch.from_config(config, "config.json")
    model = packed_model(config, shape, experts_per_chunk)
    generator = torch.Generator(device).manual_seed(0)
    state = {
        name: _random(name, sizes, shape, generator, dtype) for name, (_, sizes) in shape.expected_tensors().items()
    }
    if embedding_on_cpu:
        model.model.embed_tokens = CpuEmbedding(model.model.embed_tokens, device, dtype)
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].cpu()
    checkpoint = cast(Checkpoint, SimpleNamespace(arch=shape, config=config))
    return Base(_filled(model, state, device), checkpoint, "random", {})


def packed_model(
    config: dict[str, Any], arch: Arch, experts_per_chunk: int, storage: ExpertStorage = "mxfp4"
) -> GptOssForCausalLM:
    """transformers' model on the meta device with packed experts."""
    model = _empty(config)
    with torch.device("meta"):
        for layer in model.model.layers:
            layer.mlp.experts = PackedExperts(
                arch.num_experts, arch.hidden, arch.expert_width, arch.swiglu_limit, experts_per_chunk, storage
            )
    return model


def dequantised(base: Base) -> Base:
    """The same weights in transformers' own dense experts, which run as grouped products."""
    config, shape = base.checkpoint.config, base.checkpoint.arch
    model = _empty(config)
    model.set_experts_implementation("grouped_mm")
    state = {}
    for name, tensor in base.model.state_dict().items():
        if name.endswith("_blocks"):
            dense = [
                dequantise(blocks, scales).to(base.compute_dtype).T
                for blocks, scales in zip(tensor, base.model.state_dict()[name[:-7] + "_scales"], strict=True)
            ]
            state[name.removesuffix("_blocks")] = torch.stack(dense)
        elif not name.endswith("_scales"):
            state[name] = tensor
    checkpoint = cast(Checkpoint, SimpleNamespace(arch=shape, config=config))
    return Base(_filled(model, state, base.device), checkpoint, "random", {})


def dense_bytes(shape: Arch) -> int:
    """Bytes of the experts' weights in bfloat16."""
    return shape.num_layers * shape.num_experts * 3 * shape.hidden * shape.expert_width * 2


def _empty(config: dict[str, Any]) -> GptOssForCausalLM:
    settings = GptOssConfig.from_dict({key: value for key, value in config.items() if key != "quantization_config"})
    settings._attn_implementation = register_attention()
    with torch.device("meta"):
        model = GptOssForCausalLM(settings)
        replace_model_parts(model)
    return model


def _filled(model: GptOssForCausalLM, state: dict[str, Tensor], device: torch.device) -> GptOssForCausalLM:
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = GptOssRotaryEmbedding(model.config).to(device)
    return model.requires_grad_(False).eval()


def _random(name: str, sizes: tuple[int, ...], shape: Arch, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    device = generator.device
    if name.endswith("_blocks"):
        return torch.randint(256, sizes, generator=generator, device=device, dtype=torch.uint8)
    if name.endswith("_scales"):
        inputs = sizes[-1] * 32
        exponent = 127 + round(math.log2(inputs**-0.5 / _FP4_RMS))
        return torch.full(sizes, exponent, device=device, dtype=torch.uint8)
    if name.endswith("norm.weight"):
        return torch.ones(sizes, device=device, dtype=dtype)
    values = torch.empty(sizes, device=device, dtype=dtype).normal_(generator=generator)
    return values.mul_(0.02 if name.endswith("bias") or len(sizes) < 2 else sizes[-1] ** -0.5)
