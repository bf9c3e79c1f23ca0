"""A merged model as one GGUF file for llama.cpp, written with the public `gguf` package.

Names, splits and metadata are what llama.cpp's own converter writes for gpt-oss (llama.cpp of autumn 2026): gate
and up are separate (even and odd rows), experts keep the checkpoint's [E, out, in], norms, sinks, biases and the router
are float32. A block of MXFP4 is its scale byte and 16 bytes that store element j in the low and j + 16 in the high half
(the checkpoint: 2 j and 2 j + 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import log
from finetune.data.harmony.tokenizer import TOKENIZER_FIX, TOKENIZER_JSON, read_tokenizer
from finetune.errors import InputError, MachineError
from finetune.export.execute import PIECE_BYTES, in_order, merge_bias, worker_pool
from finetune.export.factors import part_of
from finetune.export.plan import MergePlan, Operation
from finetune.files import ResumableDirectory, sha256_of
from finetune.model.checkpoint import Checkpoint
from finetune.mxfp4.format import BLOCK, BYTES_PER_BLOCK, unpack
from finetune.rounding.merge import Tally, add_to_experts, merge_weight
from finetune.rounding.nearest import round_experts, seeded_noise
from finetune.rounding.results import RoundedExperts

_VOCABULARY_BYTES = 16 << 20  # tokens and merges in the header, roughly
_ALL, _GATE, _UP = slice(None), slice(0, None, 2), slice(1, None, 2)
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.down_proj_blocks": "ffn_down_exps.weight",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
} | {
    f"self_attn.{ours}.{part}": f"{theirs}.{part}"
    for ours, theirs in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"), ("o_proj", "attn_output"))
    for part in ("weight", "bias")
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's.
        type: `F32`, `BF16` or `MXFP4`.
        shape: sizes in values, outermost first (GGUF itself lists them the other way round).
        operation: what it is made from.
        rows: which out features of it.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    operation: Operation
    rows: slice

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape with the last axis in bytes."""
        per_row = {"F32": 4 * self.shape[-1], "BF16": 2 * self.shape[-1]}
        packed = self.shape[-1] // BLOCK * (BYTES_PER_BLOCK + 1)
        return (*self.shape[:-1], per_row.get(self.type, packed))


def gguf_name(plan: MergePlan) -> str:
    """Name of the file inside the export's directory."""
    return f"model-{plan.target}.gguf"


def gguf_bytes(plan: MergePlan) -> int:
    """Bytes the file takes, roughly (the header is estimated)."""
    return sum(math.prod(tensor.byte_shape) for tensor in plan_gguf(plan)) + _VOCABULARY_BYTES


def plan_gguf(plan: MergePlan) -> list[GgufTensor]:
    """Every tensor of the file, in the plan's order."""
    tensors = []
    for operation in plan.operations:
        if operation.name.endswith("_scales"):
            continue  # inside the blocks
        layer = re.match(r"model\.layers\.(\d+)\.(.+)", operation.name)
        prefix, name = (f"blk.{layer[1]}.", layer[2]) if layer else ("", operation.name)
        parts = [(_NAMES[name], _ALL)] if name in _NAMES else _gate_and_up(name)
        for theirs, rows in parts:
            tensors.append(_tensor(prefix + theirs, operation, rows))
    return tensors


def write_gguf(
    plan: MergePlan,
    staging: ResumableDirectory,
    rounded: RoundedExperts | None = None,
    *,
    template: str | None = None,
) -> dict[str, Tally]:
    """Write the file, one tensor in memory at a time.

    Args:
        plan: of the layout its experts shall have (`bf16` or `mxfp4`).
        staging: where. An interrupted file is begun again: it has no shards to keep.
        rounded: experts that were rounded before. None: they are rounded here.
        template: the chat template to carry; None: the base's own.

    Returns:
        What became of each update, by the name of the plan's operation.

    Raises:
        MachineError: the `gguf` package is missing.
        InputError: the base has no tokenizer.json.
    """
    name = gguf_name(plan)
    if name in staging.files:
        return {tensor: Tally(**values) for tensor, values in staging.files[name]["tallies"].items()}
    tensors = plan_gguf(plan)
    tallies: dict[str, Tally] = {}
    try:
        writer = _open_writer(plan, staging.unfinished(name), template)
        _write_tensors(plan, tensors, writer, tallies, rounded)
        writer.close()
    except BaseException:
        staging.remove_unfinished()
        raise
    stored = {key: asdict(tally) for key, tally in tallies.items()}
    staging.finish(name, {"sha256": sha256_of(staging.unfinished(name)), "tallies": stored})
    return tallies


def gguf_package() -> Any:
    """The `gguf` module.

    Raises:
        MachineError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MachineError(
            "writing GGUF needs the package gguf, which is not installed",
            fix='pip install "gpt-oss-finetune[export]", or pip install gguf',
        ) from error
    return gguf


def _gate_and_up(name: str) -> list[tuple[str, slice]]:
    part = "bias" if name.endswith("_bias") else "weight"
    assert name.startswith("mlp.experts.gate_up_proj"), name
    return [(f"ffn_gate_exps.{part}", _GATE), (f"ffn_up_exps.{part}", _UP)]


def _tensor(name: str, operation: Operation, rows: slice) -> GgufTensor:
    shape = operation.shape
    if operation.kind in ("dequantise", "merge experts"):
        shape = (shape[0], shape[2], shape[1])  # the plan's is transformers' orientation
        kind = "BF16"
    elif operation.name.endswith("_blocks"):
        shape = (*shape[:2], shape[2] * BLOCK)
        kind = "MXFP4"
    else:
        single = len(shape) == 1 or name.endswith(("_norm.weight", ".bias", "ffn_gate_inp.weight"))
        kind = "F32" if single else "BF16"
    if rows != _ALL:
        shape = (shape[0], shape[1] // 2, *shape[2:])
    return GgufTensor(name, kind, shape, operation, rows)


def _open_writer(plan: MergePlan, path: Path, template: str | None) -> Any:
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, "gpt-oss")
    _add_metadata(writer, gguf, plan)
    _add_vocabulary(writer, gguf, plan.checkpoint.directory, plan.checkpoint.arch.vocab_size, template)
    import numpy

    for tensor in plan_gguf(plan):
        size = math.prod(tensor.byte_shape)
        raw = getattr(gguf.GGMLQuantizationType, tensor.type)
        if tensor.type == "F32":
            writer.add_tensor_info(tensor.name, tensor.shape, numpy.dtype("float32"), size, raw)
        else:
            writer.add_tensor_info(tensor.name, tensor.byte_shape, numpy.dtype("uint8"), size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _add_metadata(writer: Any, gguf: Any, plan: MergePlan) -> None:
    config, shape = plan.checkpoint.config, plan.checkpoint.arch
    writer.add_type("model")
    writer.add_name("gpt-oss merged")
    writer.add_file_type(getattr(gguf.LlamaFileType, "MOSTLY_BF16" if plan.target == "bf16" else "MOSTLY_MXFP4_MOE"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.expert_width)
    writer.add_expert_feed_forward_length(shape.expert_width)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.num_active_experts)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_sliding_window(shape.sliding_window)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    rope = _rope(plan.checkpoint)
    writer.add_rope_freq_base(rope.base)
    if rope.factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)


@dataclass(frozen=True)
class _Rope:
    """Rotary base, and YaRN's factor and original context; None without YaRN."""

    base: float
    factor: float | None = None
    original_context: int | None = None


def _rope(checkpoint: Checkpoint) -> _Rope:
    """Rotary settings, from the published keys or transformers 5's `rope_parameters`."""
    config = checkpoint.config
    newer = config.get("rope_parameters") or {}
    base = config.get("rope_theta", newer.get("rope_theta"))
    if base is None:
        raise InputError("config.json has neither rope_theta nor rope_parameters", fix="use the published config.json")
    scaling = dict(config.get("rope_scaling") or newer)
    if scaling.get("rope_type") != "yarn":
        return _Rope(float(base))
    context = scaling.get("original_max_position_embeddings", config.get("initial_context_length", 4096))
    return _Rope(float(base), scaling["factor"], context)


def _add_vocabulary(writer: Any, gguf: Any, directory: Path, size: int, template: str | None) -> None:
    path = directory / TOKENIZER_JSON
    if not path.is_file():
        raise InputError(f"{directory} has no tokenizer.json", why="a GGUF file carries the tokenizer inside")
    tokenizer = read_tokenizer(path)
    tokens = [f"[PAD{number}]" for number in range(size)]  # ids without a token, as llama.cpp's converter names them
    kinds = [int(gguf.TokenType.UNUSED)] * size
    ids = [*tokenizer.model.vocab.values(), *(added.id for added in tokenizer.added_tokens)]
    if not ids or min(ids) < 0 or max(ids) >= size:
        has = f"ids from {min(ids):,} to {max(ids):,}" if ids else "no ids"
        raise InputError(f"{path} has {has}, the model those from 0 to {size - 1:,}", fix=TOKENIZER_FIX)
    for token, number in tokenizer.model.vocab.items():
        tokens[number], kinds[number] = token, int(gguf.TokenType.NORMAL)
    for added in tokenizer.added_tokens:
        kind = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
        tokens[added.id], kinds[added.id] = added.content, int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    try:
        special = gguf.SpecialVocab(directory, load_merges=True, n_vocab=size)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(
            f"the tokenizer files of {directory} cannot be read: {type(error).__name__}: {error}",
            why="tokenizer.json, tokenizer_config.json or generation_config.json has another form than the published",
            fix=TOKENIZER_FIX,
        ) from error
    special.chat_template = template or special.chat_template
    special.add_to_gguf(writer, quiet=True)


def _write_tensors(
    plan: MergePlan,
    tensors: list[GgufTensor],
    writer: Any,
    tallies: dict[str, Tally],
    rounded: RoundedExperts | None,
) -> None:
    total, done = sum(math.prod(tensor.byte_shape) for tensor in tensors), 0
    with log.Progress("writing GGUF", total >> 20, "MiB") as progress, worker_pool() as pool:
        for tensor in tensors:
            tally = Tally()
            if rounded is not None and tensor.operation.kind in ("round experts", "expert bias"):
                data = _from_rounded(rounded, tensor).numpy()
                tallies[tensor.operation.name] = rounded.tallies[tensor.operation.name]
            else:
                data = _make(plan, tensor, pool, tally).numpy()
            writer.write_tensor_data(data)
            done += data.nbytes
            progress.show(done >> 20, tensor.name)
            if tensor.operation.site and tensor.operation.name not in (rounded.tallies if rounded else ()):
                tallies.setdefault(tensor.operation.name, Tally()).add(tally)


def _from_rounded(rounded: RoundedExperts, tensor: GgufTensor) -> Tensor:
    """The whole tensor of experts that were rounded before, or of their biases."""
    name = tensor.operation.name
    if tensor.operation.kind == "expert bias":
        return rounded.read(name)[:, tensor.rows].float()
    result = torch.empty(tensor.byte_shape, dtype=torch.uint8)
    for first, last in _ranges(tensor):
        blocks = rounded.read_experts(name, first, last)[:, tensor.rows]
        scales = rounded.read_experts(name.removesuffix("_blocks") + "_scales", first, last)[:, tensor.rows]
        result[first:last] = repack(blocks.contiguous(), scales.contiguous())
    return result


def _make(plan: MergePlan, tensor: GgufTensor, pool: ThreadPoolExecutor, tally: Tally) -> Tensor:
    """The whole tensor: float32, or bytes."""
    checkpoint, operation = plan.checkpoint, tensor.operation
    factors = plan.adapter.read(operation.site) if operation.site else None
    if operation.kind == "bias":
        return merge_bias(plan, operation).float()
    if tensor.type != "MXFP4" and operation.kind in ("copy", "merge"):
        stored = checkpoint.read_rows(operation.base, 0, operation.shape[0])
        if factors is not None:
            stored, made = merge_weight(stored, factors)
            tally.add(made)
        if tensor.rows != _ALL:
            stored = stored[:, tensor.rows]
        return stored.float() if tensor.type == "F32" else stored.contiguous().view(torch.uint8)
    result = torch.empty(tensor.byte_shape, dtype=torch.uint8)

    def make(span: tuple[int, int]) -> Tally:
        first, last = span
        blocks = checkpoint.read_rows(operation.base, first, last)[:, tensor.rows].contiguous()
        scales_name = operation.base.removesuffix("_blocks") + "_scales"
        scales = checkpoint.read_rows(scales_name, first, last)[:, tensor.rows].contiguous()
        part = None if factors is None else part_of(factors, slice(first, last), tensor.rows)
        if tensor.type == "BF16":
            dense, made = add_to_experts(blocks, scales, part)
            result[first:last] = dense.view(torch.uint8)
            return made
        made = Tally()
        if part is not None and factors is not None:
            stochastic = plan.rounding == "stochastic"
            noise = seeded_noise(plan.checkpoint, operation.base, first, tensor.rows) if stochastic else None
            rows = torch.arange(factors.b.shape[1])[tensor.rows]
            blocks, scales, made = round_experts(blocks, scales, part, noise, first_expert=first, row_numbers=rows)
        result[first:last] = repack(blocks, scales)
        return made

    for made in in_order(pool, make, _ranges(tensor)):
        tally.add(made)
    return result


def _ranges(tensor: GgufTensor) -> Iterator[tuple[int, int]]:
    num_experts = tensor.shape[0]
    step = max(1, PIECE_BYTES * num_experts // math.prod(tensor.byte_shape))
    for first in range(0, num_experts, step):
        yield first, min(num_experts, first + step)


def repack(blocks: Tensor, scales: Tensor) -> Tensor:
    """The checkpoint's blocks in GGUF's order.

    Args:
        blocks, scales: uint8 [E, N, G, 16] and [E, N, G].

    Returns:
        uint8 [E, N, G * 17].
    """
    codes = unpack(blocks).view(*blocks.shape[:-1], 2, BYTES_PER_BLOCK)
    bytes_ = codes[..., 0, :] | (codes[..., 1, :] << 4)
    return torch.cat((scales.unsqueeze(-1), bytes_), dim=-1).flatten(-2)
