"""The sizes of a gpt-oss model and every tensor its checkpoint holds, from config.json alone (no torch).

Nothing else in the code knows a size: the tiny base, 20b and 120b differ in their config.json only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import InputError
from finetune.mxfp4.constants import BLOCK, BYTES_PER_BLOCK

LayerType = Literal["sliding_attention", "full_attention"]
LAYER_TYPES: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
DTYPE_BYTES = {"BF16": 2, "U8": 1, "F32": 4}

# What each key of config.json is called here. `num_experts_per_tok` is also written as `experts_per_token`.
_SIZE_KEYS = {
    "hidden": "hidden_size",
    "expert_width": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "num_active_experts": "num_experts_per_tok",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a gpt-oss model.

    Attributes:
        hidden: D, width of the residual stream.
        expert_width: I, width inside an expert; gate and up together are 2 I wide.
        num_layers: decoder layers.
        num_experts: E, routed experts in each layer.
        num_active_experts: K, experts that see a token.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves `num_heads / num_kv_heads` query heads.
        head_dim: width of one head.
        vocab_size: rows of the embedding and of the head.
        sliding_window: tokens that a sliding layer sees, the token itself included.
        layer_types: kind of attention of each layer.
        swiglu_limit: clamp of gate and up inside an expert.
        rms_norm_eps: epsilon of every norm.
    """

    hidden: int
    expert_width: int
    num_layers: int
    num_experts: int
    num_active_experts: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int
    layer_types: tuple[LayerType, ...]
    swiglu_limit: float
    rms_norm_eps: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> ModelShape:
        """Read the sizes of a gpt-oss config.json.

        Args:
            config: the parsed file.
            where: the file's name, for messages.

        Raises:
            InputError: another architecture, missing keys, or sizes that contradict each other.
        """
        _require_gpt_oss(config, where)
        values = dict(config)
        if "num_experts_per_tok" not in values and "experts_per_token" in values:
            values["num_experts_per_tok"] = values["experts_per_token"]
        needed = [*_SIZE_KEYS.values(), "layer_types", "swiglu_limit", "rms_norm_eps"]
        missing = [key for key in needed if values.get(key) is None]
        if missing:
            raise InputError(
                f"{where} lacks {_with_lookalikes(missing, config)}",
                why="every size of the model is read from there; none is guessed",
                fix="use the config.json that was published with the checkpoint",
            )
        for key in _SIZE_KEYS.values():
            if type(values[key]) is not int or values[key] < 1:
                raise InputError(f"{where}: {key} is {values[key]!r}, not a positive whole number")
        shape = cls(
            **{field: values[key] for field, key in _SIZE_KEYS.items()},
            layer_types=tuple(values["layer_types"]),
            swiglu_limit=float(values["swiglu_limit"]),
            rms_norm_eps=float(values["rms_norm_eps"]),
        )
        shape._require_consistent(where)
        return shape

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def expected_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor of a native MXFP4 checkpoint: name -> (dtype as safetensors writes it, shape).

        Linear weights are [out, in]. Source: the headers of openai/gpt-oss-20b (459 tensors) and -120b (687).
        """
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "model.embed_tokens.weight": ("BF16", (self.vocab_size, self.hidden))
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            tensors.update({prefix + name: entry for name, entry in self._layer_tensors().items()})
        tensors["model.norm.weight"] = ("BF16", (self.hidden,))
        tensors["lm_head.weight"] = ("BF16", (self.vocab_size, self.hidden))
        return tensors

    def num_bytes(self) -> int:
        """Bytes of all tensors of the native checkpoint."""
        return sum(DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in self.expected_tensors().values())

    def _layer_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        hidden, query, kv = self.hidden, self.query_size, self.kv_size
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {"input_layernorm.weight": ("BF16", (hidden,))}
        for name, out_size, in_size in (
            ("q_proj", query, hidden),
            ("k_proj", kv, hidden),
            ("v_proj", kv, hidden),
            ("o_proj", hidden, query),
        ):
            tensors[f"self_attn.{name}.weight"] = ("BF16", (out_size, in_size))
            tensors[f"self_attn.{name}.bias"] = ("BF16", (out_size,))
        tensors["self_attn.sinks"] = ("BF16", (self.num_heads,))
        tensors["post_attention_layernorm.weight"] = ("BF16", (hidden,))
        tensors["mlp.router.weight"] = ("BF16", (self.num_experts, hidden))
        tensors["mlp.router.bias"] = ("BF16", (self.num_experts,))
        for name, out_size, in_size in (
            ("gate_up_proj", 2 * self.expert_width, hidden),
            ("down_proj", hidden, self.expert_width),
        ):
            grid = (self.num_experts, out_size, in_size // BLOCK)
            tensors[f"mlp.experts.{name}_blocks"] = ("U8", (*grid, BYTES_PER_BLOCK))
            tensors[f"mlp.experts.{name}_scales"] = ("U8", grid)
            tensors[f"mlp.experts.{name}_bias"] = ("BF16", (self.num_experts, out_size))
        return tensors

    def _require_consistent(self, where: str) -> None:
        unknown = sorted({kind for kind in self.layer_types if kind not in LAYER_TYPES})
        problems = {
            f"layer_types names {', '.join(map(repr, unknown))}": bool(unknown),
            f"layer_types has {len(self.layer_types)} entries for {self.num_layers} layers": (
                len(self.layer_types) != self.num_layers
            ),
            f"{self.num_heads} query heads do not divide among {self.num_kv_heads} key heads": (
                self.num_heads % self.num_kv_heads != 0
            ),
            f"{self.num_active_experts} experts per token of {self.num_experts}": (
                self.num_active_experts > self.num_experts
            ),
            f"hidden_size {self.hidden} and intermediate_size {self.expert_width} must be multiples of 32": (
                self.hidden % BLOCK != 0 or self.expert_width % BLOCK != 0
            ),
        }
        for problem, present in problems.items():
            if present:
                raise InputError(f"{where} contradicts itself or the MXFP4 format: {problem}")


def _require_gpt_oss(config: Mapping[str, Any], where: str) -> None:
    model_type = config.get("model_type")
    if model_type != "gpt_oss":
        raise InputError(
            f"{where} describes another architecture: model_type is {model_type!r}, not 'gpt_oss'",
            why="this toolkit knows gpt-oss only",
            fix="use openai/gpt-oss-20b, openai/gpt-oss-120b or a checkpoint in their layout",
        )
    for key, published in (("tie_word_embeddings", False), ("attention_bias", True)):
        if config.get(key, published) is not published:
            raise InputError(
                f"{where}: {key} is {config[key]!r}; published gpt-oss models have {published}",
                why="the tensors would differ from the published layout",
            )


def _with_lookalikes(missing: list[str], config: Mapping[str, Any]) -> str:
    parts = []
    for key in missing:
        close = difflib.get_close_matches(key, list(config), n=1, cutoff=0.85)
        parts.append(f"{key} (it has {close[0]})" if close and close[0] != key else key)
    return ", ".join(parts)
