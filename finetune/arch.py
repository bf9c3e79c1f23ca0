"""Dimensions of a gpt-oss model and the names of its tensors, from config.json alone (no torch).

No other module states a size: the tiny base, 20b and 120b differ in their config.json only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import InputError
from finetune.files import read_json

LayerType = Literal["sliding_attention", "full_attention"]
LAYER_TYPES: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I8": 1}
"""Bytes per element of the dtypes that a checkpoint may store, named as in safetensors."""
MXFP4_BLOCK = 32
"""Weights that share one scale byte; each takes half a byte."""
MXFP4_BITS = 4 + 8 / MXFP4_BLOCK

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PROJECTIONS = ("gate_up_proj", "down_proj")
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT_HEAD = "lm_head.weight"

TensorSpec = tuple[str, tuple[int, ...]]
"""A tensor's dtype, as safetensors names it, and its shape."""

# The key of each size in config.json. `num_experts_per_tok` is also spelt `experts_per_token`.
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
_CONFIG_FIX = "use the config.json that was published with the checkpoint"
_LARGEST_SIZE = 2**31
_ROPE_TYPES = ("default", "yarn")
_ROPE_NUMBERS = (
    "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
    "mscale_all_dim", "partial_rotary_factor",
)  # fmt: skip
_DEFAULT_MAX_POSITIONS = 131_072  # transformers' GptOssConfig, and both published models


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Dimensions of a gpt-oss model.

    Attributes:
        hidden: D, width of the residual stream.
        expert_width: F, width inside an expert; gate and up together are 2 F wide.
        num_layers: decoder layers.
        num_experts: E, routed experts in each layer.
        num_active_experts: K, experts that process a token.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves `num_heads / num_kv_heads` query heads.
        head_dim: width of one head.
        vocab_size: rows of the embedding and of the output head, which are two tensors.
        sliding_window: tokens that a sliding layer attends to, the token itself included.
        layer_types: kind of attention of each layer.
        swiglu_limit: clamp of gate and up inside an expert.
        rms_norm_eps: epsilon of every norm.
        max_positions: longest sequence the model was made for, in tokens.
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
    max_positions: int = _DEFAULT_MAX_POSITIONS

    @classmethod
    def read(cls, path: Path) -> Arch:
        """Read the dimensions from a config.json.

        Raises:
            InputError: the file cannot be read, or `from_config` refuses it.
        """
        return cls.from_config(read_json(path, "a model's config.json"), str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Arch:
        """Read the dimensions from the content of a gpt-oss config.json.

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
                fix=_CONFIG_FIX,
            )
        values.setdefault("max_position_embeddings", _DEFAULT_MAX_POSITIONS)
        for key in (*_SIZE_KEYS.values(), "max_position_embeddings"):
            if type(values[key]) is not int or not 1 <= values[key] < _LARGEST_SIZE:
                shown = repr(values[key])[:80]
                raise InputError(f"{where}: {key} is {shown}, not a positive whole number of a model", fix=_CONFIG_FIX)
        for key in ("swiglu_limit", "rms_norm_eps"):
            _require_positive(values[key], key, where)
        layer_types = values["layer_types"]
        if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
            raise InputError(f"{where}: layer_types is {repr(layer_types)[:80]}, not a list of names", fix=_CONFIG_FIX)
        _require_rope(config, where)
        arch = cls(
            **{field: values[key] for field, key in _SIZE_KEYS.items()},
            layer_types=tuple(layer_types),
            swiglu_limit=float(values["swiglu_limit"]),
            rms_norm_eps=float(values["rms_norm_eps"]),
            max_positions=values["max_position_embeddings"],
        )
        arch._require_consistent(where)
        return arch

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def full_layers(self) -> int:
        """Layers with full attention; the others slide."""
        return self.layer_types.count("full_attention")

    @property
    def attention_weights(self) -> int:
        """Elements of one layer's q, k, v and o weights, without biases."""
        return 2 * self.hidden * (self.query_size + self.kv_size)

    @property
    def attention_vectors(self) -> int:
        """Elements of one layer's attention biases, sinks and both norms."""
        return self.query_size + 2 * self.kv_size + self.hidden + self.num_heads + 2 * self.hidden

    @property
    def router_parameters(self) -> int:
        """Elements of one layer's router, bias included."""
        return self.num_experts * (self.hidden + 1)

    @property
    def expert_weights(self) -> int:
        """Elements of one expert's two projections, without biases: 3 D F."""
        return 3 * self.hidden * self.expert_width

    @property
    def expert_biases(self) -> int:
        """Elements of one expert's biases."""
        return 2 * self.expert_width + self.hidden

    @property
    def num_parameters(self) -> int:
        """All weights of the model."""
        experts = self.num_experts * (self.expert_weights + self.expert_biases)
        layer = self.attention_weights + self.attention_vectors + self.router_parameters + experts
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden + self.hidden

    def expected_tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of a native MXFP4 checkpoint: name -> (dtype as safetensors writes it, shape).

        Linear weights are [out, in]. Source: the headers of openai/gpt-oss-20b (459 tensors) and -120b (687).
        """
        tensors: dict[str, TensorSpec] = {EMBEDDING: ("BF16", (self.vocab_size, self.hidden))}
        for layer in range(self.num_layers):
            prefix = layer_prefix(layer)
            tensors.update({prefix + name: spec for name, spec in self._layer_tensors().items()})
        tensors[FINAL_NORM] = ("BF16", (self.hidden,))
        tensors[OUTPUT_HEAD] = ("BF16", (self.vocab_size, self.hidden))
        return tensors

    def num_bytes(self) -> int:
        """Bytes of all tensors of the native checkpoint."""
        return sum(DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in self.expected_tensors().values())

    def _layer_tensors(self) -> dict[str, TensorSpec]:
        hidden, query, kv = self.hidden, self.query_size, self.kv_size
        tensors: dict[str, TensorSpec] = {"input_layernorm.weight": ("BF16", (hidden,))}
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
            grid = (self.num_experts, out_size, in_size // MXFP4_BLOCK)
            tensors[f"mlp.experts.{name}_blocks"] = ("U8", (*grid, MXFP4_BLOCK // 2))
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
                self.hidden % MXFP4_BLOCK != 0 or self.expert_width % MXFP4_BLOCK != 0
            ),
        }
        for problem, present in problems.items():
            if present:
                raise InputError(f"{where} contradicts itself or the MXFP4 format: {problem}")


def layer_prefix(layer: int) -> str:
    """Start of the names of a layer's tensors.

    >>> layer_prefix(3) + "self_attn.sinks"
    'model.layers.3.self_attn.sinks'
    """
    return f"model.layers.{layer}."


def attention_path(layer: int, projection: str) -> str:
    """Path of an attention projection, without `.weight` or `.bias`.

    >>> attention_path(3, "q_proj")
    'model.layers.3.self_attn.q_proj'
    """
    return f"{layer_prefix(layer)}self_attn.{projection}"


def router_path(layer: int) -> str:
    """Path of a router, without `.weight` or `.bias`.

    >>> router_path(3)
    'model.layers.3.mlp.router'
    """
    return f"{layer_prefix(layer)}mlp.router"


def experts_path(layer: int, projection: str | None = None) -> str:
    """Path of a layer's experts, or of one of their projections without `_blocks`, `_scales` or `_bias`.

    >>> experts_path(3), experts_path(3, "down_proj")
    ('model.layers.3.mlp.experts', 'model.layers.3.mlp.experts.down_proj')
    """
    return f"{layer_prefix(layer)}mlp.experts" + (f".{projection}" if projection else "")


def _require_gpt_oss(config: Mapping[str, Any], where: str) -> None:
    model_type = config.get("model_type")
    if model_type != "gpt_oss":
        raise InputError(
            f"{where} describes another architecture: model_type is {model_type!r}, not 'gpt_oss'",
            why="this toolkit supports gpt-oss only",
            fix="use openai/gpt-oss-20b, openai/gpt-oss-120b or a checkpoint in their layout",
        )
    for key, published in (("tie_word_embeddings", False), ("attention_bias", True), ("hidden_act", "silu")):
        found = config.get(key, published)
        if type(found) is not type(published) or found != published:
            raise InputError(
                f"{where}: {key} is {repr(found)[:80]}; published gpt-oss models have {published}",
                why="the model would be another one than the published, which is computed here",
            )


def _require_positive(value: object, key: str, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{where}: {key} is {repr(value)[:80]}, not a positive number", fix=_CONFIG_FIX)


def _require_rope(config: Mapping[str, Any], where: str) -> None:
    """Check the rotary settings, in the published keys or in transformers 5's `rope_parameters`."""
    for key in ("rope_theta", "initial_context_length"):
        if config.get(key) is not None:
            _require_positive(config[key], key, where)
    for section in ("rope_scaling", "rope_parameters"):
        rope = config.get(section)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise InputError(f"{where}: {section} is {repr(rope)[:80]}, not a group of settings", fix=_CONFIG_FIX)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _ROPE_TYPES:
            known = " or ".join(map(repr, _ROPE_TYPES))
            raise InputError(f"{where}: {section}.rope_type is {repr(kind)[:80]}, not {known}", fix=_CONFIG_FIX)
        for key, value in rope.items():
            if key in _ROPE_NUMBERS and value is not None:
                _require_positive(value, f"{section}.{key}", where)
        if not isinstance(rope.get("truncate", False), bool):
            raise InputError(f"{where}: {section}.truncate is {repr(rope['truncate'])[:80]}, not true or false")
        if kind == "yarn" and rope.get("factor") is None:
            raise InputError(f"{where}: {section} is yarn's and lacks factor", fix=_CONFIG_FIX)


def _with_lookalikes(missing: list[str], config: Mapping[str, Any]) -> str:
    parts = []
    for key in missing:
        close = difflib.get_close_matches(key, list(config), n=1, cutoff=0.85)
        parts.append(f"{key} (it has {close[0]})" if close and close[0] != key else key)
    return ", ".join(parts)


# Former place of `finetune.arch`; to be folded into it.

__all__ = ["DTYPE_BYTES", "LAYER_TYPES", "Arch", "LayerType"]
