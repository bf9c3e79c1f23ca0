"""Build the frozen base: transformers' gpt-oss with our packed experts and attention, filled from the checkpoint.

The model is laid out on the meta device, so that no weight exists twice; transformers' dense experts never get memory.
Each tensor is read once, hashed as it passes, and moved to its device; what the identity covers is what was loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRotaryEmbedding

from finetune import log
from finetune.config.schema import ModelConfig
from finetune.errors import CheckError, ConfigError, MachineError
from finetune.kernels.attention import plan_attention
from finetune.model.attention import register_attention
from finetune.model.checkpoint import Checkpoint, DenseCheckpoint
from finetune.model.experts import PackedExperts
from finetune.model.identity import checkpoint_identity, identity, tensor_digest
from finetune.model.nf4 import Nf4Linear
from finetune.model.shards import ShardedLayers
from finetune.model.storage import BaseStorage, CpuEmbedding, StorageConverter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CONSEQUENCE = "the adapter is trained over the rounded weights and records it"
STORED_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8}


@dataclass(frozen=True)
class Base:
    """A frozen base in memory.

    Attributes:
        model: transformers' module tree, every parameter frozen, in evaluation mode.
        checkpoint: the files it came from.
        identity: hash of every tensor's name, dtype, shape and bytes (see `finetune.model.identity`).
        digests: sha256 of each held tensor's bytes by name, so that a changed one can be named. What the checkpoint
            has under the same name counts in the checkpoint's dtype.
        storage: how it is held.
        storage_errors: relative RMS, by part, of what holding weights in NF4 changed in them; empty: nothing.
        shards: what gathers the layers of which this process holds a part. None: it holds them whole.
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
        """Where the base computes; its input embedding may be elsewhere."""
        return self.model.lm_head.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of activations and of everything that is not packed."""
        return self.model.lm_head.weight.dtype

    @property
    def held_as(self) -> dict[str, dict[str, str | float]]:
        """Parts held in a format that changed their values: `{"experts": {"format": "nf4", "relative_rms": 0.1}}`.

        Empty: the base computes what its checkpoint does.
        """
        rounded = self.storage.rounded
        return {part: {"format": form, "relative_rms": self.storage_errors[part]} for part, form in rounded.items()}

    @property
    def expert_rounding_error(self) -> float:
        """Relative RMS of what rounding changed in a bfloat16 base's experts; 0 for a native one."""
        return self.checkpoint.rounding_error() if isinstance(self.checkpoint, DenseCheckpoint) else 0.0


def choose_device(config: ModelConfig) -> torch.device:
    """The device a recipe asks for.

    Raises:
        MachineError: `cuda` was asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "model.device is cuda, but torch sees no GPU",
            why=f"this torch is {torch.__version__}; a build with +cpu cannot use one",
            fix="install a CUDA build of torch (README, Install), or set model.device=cpu",
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The compute dtype a recipe asks for on this device (`auto`: bfloat16 on a GPU, float32 on a CPU).

    Raises:
        ConfigError: float32 on a GPU, where torch's grouped matrix product takes bfloat16 only.
    """
    if device.type == "cuda" and config.compute_dtype == "float32":
        raise ConfigError(
            "model.compute_dtype is float32 on a GPU",
            why="the experts' grouped matrix product takes bfloat16 there",
            fix="leave model.compute_dtype at auto, or set model.device=cpu",
        )
    if config.compute_dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[config.compute_dtype]


def build_base(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    experts_per_chunk: int,
    storage: BaseStorage | None = None,
    shards: ShardedLayers | None = None,
) -> Base:
    """Read a checkpoint into a frozen model; experts of a bfloat16 one are rounded to MXFP4, and that is said.

    Args:
        checkpoint: opened and validated.
        device: where the model lives.
        dtype: dtype of everything that is not packed. Tensors are stored in bfloat16, so float32 loses nothing.
        experts_per_chunk: experts dequantised at a time.
        storage: how to hold it. None: as the checkpoint does. NF4 is rounded here, and that is said.
        shards: takes the layers, of which this process then holds a part. None: it holds them whole.

    Raises:
        MachineError: NF4 is asked for without bitsandbytes.
    """
    storage = storage or BaseStorage()
    holder, on_host = StorageConverter(device, dtype, storage), StorageConverter(torch.device("cpu"), dtype, storage)
    model = _empty_model(checkpoint, experts_per_chunk, storage)
    if storage.embedding_on_cpu:
        model.model.embed_tokens = CpuEmbedding(model.model.embed_tokens, device, dtype)
    state: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    converted: dict[str, str] = {}
    names = sorted(checkpoint.names())
    with log.Progress("reading base", len(names), "tensors") as progress:
        for name in names:
            stored = checkpoint.read(name)
            digests[name] = tensor_digest(stored)
            dealt_out = shards is not None and shards.takes(name)
            held = (on_host if dealt_out else holder).hold(name, stored)
            if shards is not None and dealt_out:
                shards.take(held)
            else:
                state |= held
            if held.keys() != {name}:
                converted |= {part: tensor_digest(tensor) for part, tensor in held.items()}
            progress.advance()
    if shards is not None:
        state |= shards.finish()
        shards.attach(model)
    model.load_state_dict(state, strict=True, assign=True)
    # Rotary frequencies are not in the checkpoint and are garbage after the meta device: build them again.
    model.model.rotary_emb = GptOssRotaryEmbedding(model.config).to(device)
    model.requires_grad_(False)
    model.eval()
    _refuse_unfilled(model)
    errors = holder.rounding_errors()
    for part, error in errors.items():
        log.info(f"{part}: held in NF4, which changed them by {error:.2%} (relative RMS); {_CONSEQUENCE}")
    held_digests = {name: digest for name, digest in digests.items() if name in state} | converted
    return Base(model, checkpoint, _identity(checkpoint, digests), held_digests, storage, errors, shards)


def _empty_model(checkpoint: Checkpoint, experts_per_chunk: int, storage: BaseStorage) -> GptOssForCausalLM:
    """transformers' model on the meta device, its experts replaced by packed ones."""
    settings = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config = GptOssConfig.from_dict(settings)
    config._attn_implementation = register_attention()
    shape = checkpoint.shape
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp.experts = PackedExperts(
                shape.num_experts,
                shape.hidden,
                shape.expert_width,
                shape.swiglu_limit,
                experts_per_chunk,
                storage.experts,
            )
            if storage.attention == "nf4":
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    setattr(layer.self_attn, name, Nf4Linear(getattr(layer.self_attn, name)))
    return model


def _refuse_unfilled(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    unfilled = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if unfilled:
        raise CheckError(f"tensors were never filled: {', '.join(unfilled[:5])}", why="this is a bug in base loading")


def _identity(checkpoint: Checkpoint, digests: dict[str, str]) -> str:
    """The files' identity. What was held is what was read, except for experts that were rounded on the way."""
    if isinstance(checkpoint, DenseCheckpoint):
        log.info(checkpoint.describe_rounding())
        return checkpoint_identity(checkpoint)
    return identity(
        (name, checkpoint.dtype(name), checkpoint.tensor_shape(name), digest) for name, digest in digests.items()
    )


def check_unchanged(base: Base) -> str:
    """Hash the live base again and compare: training must not have touched a bit of it.

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
                base.shards.hold_layer_of(name)
            held = state[name]
            packed = held.dtype == torch.uint8 or name not in base.checkpoint.entries
            stored = held if packed else held.to(STORED_DTYPES[base.checkpoint.dtype(name)])
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


# Run a checkpoint layer by layer, one layer in memory at a time: for work on models that need not fit as a whole.

EMBEDDING = "model.embed_tokens.weight"


class LayerStream:
    """A checkpoint's layers, read one by one.

    Args:
        checkpoint: in the native layout.
        device: where a layer computes.
        dtype: of activations and of everything that is not packed.
        experts_per_chunk: experts dequantised at a time.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, experts_per_chunk: int
    ) -> None:
        settings = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        self.config = GptOssConfig.from_dict(settings)
        self.config._attn_implementation = register_attention()
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self._experts_per_chunk = experts_per_chunk
        self._rotary = GptOssRotaryEmbedding(self.config).to(device)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embedded tokens [B, T, D] of ids int64 [B, T]; only their rows are read."""
        return self.checkpoint.read(EMBEDDING)[input_ids].to(self.device, self.dtype)

    def read(self, number: int) -> GptOssDecoderLayer:
        """A layer with its weights, frozen, in evaluation mode."""
        shape, prefix = self.checkpoint.shape, f"model.layers.{number}."
        with torch.device("meta"):
            layer = GptOssDecoderLayer(self.config, number)
            layer.mlp.experts = PackedExperts(
                shape.num_experts, shape.hidden, shape.expert_width, shape.swiglu_limit, self._experts_per_chunk
            )
        state = {}
        for name in self.checkpoint.names():
            if name.startswith(prefix):
                stored = self.checkpoint.read(name)
                held = stored.to(self.device) if stored.dtype == torch.uint8 else stored.to(self.device, self.dtype)
                state[name.removeprefix(prefix)] = held
        layer.load_state_dict(state, strict=True, assign=True)
        return layer.requires_grad_(False).eval()

    @torch.no_grad()
    def run(
        self, layer: GptOssDecoderLayer, number: int, hidden: Tensor, positions: Tensor, segments: Tensor
    ) -> Tensor:
        """One layer over packed rows.

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
