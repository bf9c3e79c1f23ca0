"""Build a frozen base: transformers' gpt-oss with packed experts and our attention, filled from a checkpoint.

The model is laid out on the meta device, so that no weight exists twice; transformers' dense experts never get memory.
Each tensor is read once, hashed as it passes, and moved to its device, so the identity is that of the bytes loaded.
`LayerStream` builds one layer at a time, for work on models that need not fit into memory as a whole.

Commands open a base with `finetune.model.open.open_base`, which also chooses kernels and checks what was built.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRotaryEmbedding

from finetune import log
from finetune.arch import ATTENTION_PROJECTIONS, EMBEDDING, layer_prefix
from finetune.errors import CheckError, InputError
from finetune.kernels.attention import plan_attention
from finetune.model.attention import register_attention, replace_layer_parts, replace_model_parts
from finetune.model.checkpoint import CONFIG_FILE, Checkpoint, DenseCheckpoint
from finetune.model.experts import PackedExperts
from finetune.model.identity import checkpoint_identity, identity, tensor_digest
from finetune.model.nf4 import Nf4Linear
from finetune.model.shards import ShardedLayers
from finetune.model.storage import BaseStorage, CpuEmbedding, ExpertStorage, StorageConverter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NAN_SCALE = 255  # a scale byte is a power of two with a bias of 127; this one means NaN (OCP MX specification 1.0)
_STORED_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8}


@dataclass(frozen=True)
class Base:
    """A frozen base in memory.

    Attributes:
        model: transformers' module tree, every parameter frozen, in evaluation mode.
        checkpoint: the files it was read from.
        identity: hash of every tensor's name, dtype, shape and bytes (see `finetune.model.identity`).
        digests: SHA-256 of each stored tensor's bytes by name, so that a changed one can be named. Where the checkpoint
            has a tensor of the same name, in the checkpoint's dtype.
        storage: its storage formats.
        storage_errors: relative RMS, by part, of the change that NF4 made in the weights; empty: none.
        shards: gathers the layers of which this rank stores a part. None: it stores them whole.
    """

    model: GptOssForCausalLM
    checkpoint: Checkpoint
    identity: str
    digests: dict[str, str]
    storage: BaseStorage = field(default_factory=BaseStorage)
    storage_errors: dict[str, float] = field(default_factory=dict)
    shards: ShardedLayers | None = None

    @property
    def device(self) -> torch.device:
        """The device that computes; the input embedding may be on another."""
        return self.model.lm_head.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of activations and of everything that is not packed."""
        return self.model.lm_head.weight.dtype

    @property
    def storage_changes(self) -> dict[str, dict[str, str | float]]:
        """Parts whose storage format changed their values: `{"experts": {"format": "nf4", "relative_rms": 0.1}}`.

        Empty: the base computes what its checkpoint does.
        """
        rounded = self.storage.rounded
        return {part: {"format": form, "relative_rms": self.storage_errors[part]} for part, form in rounded.items()}

    @property
    def expert_rounding_error(self) -> float:
        """Relative RMS of the change that rounding made in a bfloat16 checkpoint's experts; 0 for a native one."""
        return self.checkpoint.rounding_error() if isinstance(self.checkpoint, DenseCheckpoint) else 0.0


def build_base(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    experts_per_chunk: int,
    storage: BaseStorage | None = None,
    shards: ShardedLayers | None = None,
) -> Base:
    """Read a checkpoint into a frozen model, with the reference kernels.

    Experts of a bfloat16 checkpoint are quantised to MXFP4, and what the storage asks for to NF4; both are logged.

    Args:
        checkpoint: opened and validated.
        device: of the model.
        dtype: of everything that is not packed. Checkpoints are in bfloat16, so float32 loses nothing.
        experts_per_chunk: experts dequantised at a time.
        storage: storage formats. None: the checkpoint's own.
        shards: receives the layers, of which this rank then stores a part. None: this rank stores them whole.

    Raises:
        MachineError: NF4 is asked for without bitsandbytes.
        InputError: a tensor holds NaN or infinity, or config.json describes a model that cannot be built.
    """
    storage = storage or BaseStorage()
    model = _empty_model(checkpoint, experts_per_chunk, storage)
    if storage.embedding_on_cpu:
        model.model.embed_tokens = CpuEmbedding(model.model.embed_tokens, device, dtype)
    read = _read_tensors(checkpoint, StorageConverter(device, dtype, storage), shards)
    if shards is not None:
        shards.attach(model)
    model.load_state_dict(read.state, strict=True, assign=True)
    # Rotary frequencies are not in the checkpoint and are garbage after the meta device: build them again.
    model.model.rotary_emb = GptOssRotaryEmbedding(model.config).to(device)
    model.requires_grad_(False)
    model.eval()
    _require_filled(model)
    for part, error in read.rounding_errors.items():
        log.info(
            f"{part}: stored in NF4, which changed them by {error:.2%} (relative RMS); "
            "the adapter is trained over the rounded weights and records it"
        )
    base_identity = _identity(checkpoint, read.digests)
    return Base(model, checkpoint, base_identity, read.state_digests, storage, read.rounding_errors, shards)


@dataclass(frozen=True)
class _ReadTensors:
    """A checkpoint's tensors, converted to their storage formats.

    Attributes:
        state: the model's tensors by name.
        digests: SHA-256 of each tensor as the checkpoint has it, by its name there.
        state_digests: see `Base.digests`.
        rounding_errors: see `Base.storage_errors`.
    """

    state: dict[str, Tensor]
    digests: dict[str, str]
    state_digests: dict[str, str]
    rounding_errors: dict[str, float]


def _read_tensors(checkpoint: Checkpoint, converter: StorageConverter, shards: ShardedLayers | None) -> _ReadTensors:
    """Read, hash and convert every tensor; those of layers go to `shards`, if there are any."""
    on_host = StorageConverter(torch.device("cpu"), converter.dtype, converter.storage)
    state: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    converted_digests: dict[str, str] = {}
    names = sorted(checkpoint.names())
    with log.Progress("reading base", len(names), "tensors") as progress:
        for name in names:
            stored = checkpoint.read(name)
            digests[name] = tensor_digest(stored)
            _require_numbers(checkpoint, name, stored)
            is_sharded = shards is not None and shards.is_layer_tensor(name)
            converted = (on_host if is_sharded else converter).convert(name, stored)
            if shards is not None and is_sharded:
                shards.add(converted)
            else:
                state |= converted
            if converted.keys() != {name}:
                converted_digests |= {part: tensor_digest(tensor) for part, tensor in converted.items()}
            progress.advance()
    if shards is not None:
        state |= shards.finish()
    state_digests = {name: digest for name, digest in digests.items() if name in state} | converted_digests
    return _ReadTensors(state, digests, state_digests, converter.rounding_errors())


def _require_numbers(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    """Raise InputError if a stored tensor is not finite: everything computed from it would be NaN."""
    is_scale = name.endswith("_scales")
    bad = tensor == _NAN_SCALE if is_scale else ~tensor.isfinite() if tensor.is_floating_point() else None
    if bad is None or not bad.any():
        return
    where = ", ".join(map(str, bad.nonzero()[0].tolist()))
    kind = f"scales of {_NAN_SCALE}, which is NaN in MXFP4" if is_scale else "values that are not finite"
    raise InputError(
        f"{checkpoint.directory / checkpoint.entries[name].file}: {name} has {int(bad.sum()):,} {kind}, the first at "
        f"[{where}]",
        why="the base is damaged, or was made from weights that were not finite: its outputs would be NaN",
        fix="download or copy the checkpoint again",
    )


def _empty_model(checkpoint: Checkpoint, experts_per_chunk: int, storage: BaseStorage) -> GptOssForCausalLM:
    """transformers' model on the meta device, its experts replaced by packed ones."""
    with torch.device("meta"):
        try:
            model = GptOssForCausalLM(_model_config(checkpoint))
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
            raise _cannot_build(checkpoint, error) from error
        except (RuntimeError, StrictDataclassError) as error:
            raise _cannot_build(checkpoint, error) from error
        replace_model_parts(model)
        for layer in model.model.layers:
            layer.mlp.experts = _packed_experts(checkpoint, experts_per_chunk, storage.experts)
            if storage.attention == "nf4":
                for name in ATTENTION_PROJECTIONS:
                    setattr(layer.self_attn, name, Nf4Linear(getattr(layer.self_attn, name)))
    return model


def _cannot_build(checkpoint: Checkpoint, error: Exception) -> InputError:
    return InputError(
        f"{checkpoint.directory / CONFIG_FILE} describes a model that transformers cannot build",
        why=f"{type(error).__name__}: {' '.join(str(error).split())}",
        fix="use the config.json that was published with the checkpoint",
    )


def _model_config(checkpoint: Checkpoint) -> GptOssConfig:
    """transformers' configuration with our attention. Without quantization_config, or it would quantise by itself."""
    settings = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config = GptOssConfig.from_dict(settings)
    config._attn_implementation = register_attention()
    return config


def _packed_experts(checkpoint: Checkpoint, experts_per_chunk: int, storage: ExpertStorage = "mxfp4") -> PackedExperts:
    arch = checkpoint.arch
    return PackedExperts(
        arch.num_experts, arch.hidden, arch.expert_width, arch.swiglu_limit, experts_per_chunk, storage
    )


def _require_filled(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    unfilled = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if unfilled:
        raise CheckError(f"tensors were never filled: {', '.join(unfilled[:5])}", why="this is a bug in base loading")


def _identity(checkpoint: Checkpoint, digests: dict[str, str]) -> str:
    """The files' identity. The digests are of the files' tensors, except for experts that were quantised on the way."""
    if isinstance(checkpoint, DenseCheckpoint):
        log.info(checkpoint.describe_rounding())
        return checkpoint_identity(checkpoint)
    return identity(
        (name, checkpoint.dtype(name), checkpoint.tensor_shape(name), digest) for name, digest in digests.items()
    )


def check_unchanged(base: Base) -> str:
    """Hash the live base again and compare: training must not have changed a bit of it.

    Returns:
        The identity, equal to `base.identity`.

    Raises:
        CheckError: names the tensors that differ.
    """
    state = base.model.state_dict()
    changed = []
    names = sorted(base.digests)
    with log.Progress("checking frozen base", len(names), "tensors") as progress:
        for name in names:
            if base.shards is not None:
                base.shards.gather_layer_of(name)
            tensor = state[name]
            is_converted = tensor.dtype == torch.uint8 or name not in base.checkpoint.entries
            stored = tensor if is_converted else tensor.to(_STORED_DTYPES[base.checkpoint.dtype(name)])
            if tensor_digest(stored.cpu()) != base.digests[name]:
                changed.append(name)
            progress.advance()
    if changed:
        raise CheckError(
            f"the frozen base changed during training: {', '.join(changed[:5])} ({len(changed)} tensors)",
            why="an adapter trained over a moving base is worthless with the published one",
            fix="please report this with the recipe; do not use the adapter",
        )
    return base.identity


class LayerStream:
    """The layers of a checkpoint, built one at a time.

    Args:
        checkpoint: in the native layout.
        device: of the layers.
        dtype: of activations and of everything that is not packed.
        experts_per_chunk: experts dequantised at a time.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, experts_per_chunk: int
    ) -> None:
        self.config = _model_config(checkpoint)
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self._experts_per_chunk = experts_per_chunk
        self._rotary = GptOssRotaryEmbedding(self.config).to(device)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embedded tokens [B, T, D] of ids int64 [B, T]; only their rows are read."""
        return self.checkpoint.read(EMBEDDING)[input_ids].to(self.device, self.dtype)

    def read(self, number: int) -> GptOssDecoderLayer:
        """A layer with its weights, frozen, in evaluation mode."""
        prefix = layer_prefix(number)
        with torch.device("meta"):
            layer = GptOssDecoderLayer(self.config, number)
            replace_layer_parts(layer, self.config, number)
            layer.mlp.experts = _packed_experts(self.checkpoint, self._experts_per_chunk)
        state = {}
        for name in self.checkpoint.names():
            if name.startswith(prefix):
                stored = self.checkpoint.read(name)
                is_packed = stored.dtype == torch.uint8
                on_device = stored.to(self.device) if is_packed else stored.to(self.device, self.dtype)
                state[name.removeprefix(prefix)] = on_device
        layer.load_state_dict(state, strict=True, assign=True)
        return layer.requires_grad_(False).eval()

    @torch.no_grad()
    def run(
        self, layer: GptOssDecoderLayer, number: int, hidden: Tensor, positions: Tensor, segments: Tensor
    ) -> Tensor:
        """One layer over packed sequences.

        Args:
            layer: from `read`.
            number: its number, which decides the window.
            hidden: [B, T, D].
            positions, segments: int64 [B, T], as in `finetune.model.forward.hidden_states`.

        Returns:
            [B, T, D].
        """
        window = self.config.sliding_window if self.config.layer_types[number] == "sliding_attention" else None
        positions = positions.to(self.device)
        output: Tensor = layer(
            hidden,
            attention_mask=plan_attention(segments, positions.cpu(), window).to(self.device),
            position_ids=positions,
            position_embeddings=self._rotary(hidden, positions),
            use_cache=False,
        )
        return output
