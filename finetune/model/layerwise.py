"""Run a checkpoint layer by layer, one layer in memory at a time: for work on models that need not fit as a whole."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRotaryEmbedding

from finetune.kernels.attention import plan_attention
from finetune.model.attention import register_attention
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import PackedExperts

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
