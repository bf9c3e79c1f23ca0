"""What an estimate needs to know of a base: its sizes, from config.json alone, and its files if they are here.

20b's and 120b's config.json ship with the toolkit, so nothing has to be downloaded first. `finetune.model` reads the
same file with far more checks; this package stands beside it and imports neither it nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.paths import shipped_dir
from finetune.errors import InputError

PUBLISHED = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
MXFP4_BITS = 4.25  # 32 four-bit values and a scale byte
_KEYS = {
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
    "max_positions": "max_position_embeddings",
}


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """Sizes of a gpt-oss model.

    Attributes:
        hidden, expert_width: D and F; gate and up together are 2 F wide.
        num_layers, num_experts, num_active_experts: layers, experts in each, experts that see a token.
        num_heads, num_kv_heads, head_dim: of attention.
        vocab_size: rows of the embedding and of the head, which are two tensors.
        sliding_window: keys that a query of a sliding layer sees.
        full_layers: layers whose queries see the whole sample.
        max_positions: longest sample the model was made for, in tokens.
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
    full_layers: int
    max_positions: int

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Elements of a layer's q, k, v and o weights, without biases."""
        return 2 * self.hidden * (self.query_size + self.kv_size)

    @property
    def attention_vectors(self) -> int:
        """Elements of a layer's attention biases, sinks and both norms."""
        return self.query_size + 2 * self.kv_size + self.hidden + self.num_heads + 2 * self.hidden

    @property
    def router(self) -> int:
        """Elements of a layer's router, bias included."""
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
        layer = self.attention_weights + self.attention_vectors + self.router + experts
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden + self.hidden

    @property
    def native_bytes(self) -> int:
        """Bytes of the published checkpoint's tensors: packed experts, everything else in bfloat16."""
        packed = self.num_layers * self.num_experts * self.expert_weights
        return round(packed * MXFP4_BITS / 8) + 2 * (self.num_parameters - packed)


@dataclass(frozen=True)
class BaseFacts:
    """A base that an estimate is made for.

    Attributes:
        name: as the recipe calls it.
        shape: its sizes.
        source: where they were read.
        files_bytes: bytes of its safetensors files if they are here; None: they would be downloaded.
    """

    name: str
    shape: BaseShape
    source: str
    files_bytes: int | None


def find_base(path: str) -> BaseFacts | None:
    """Read the sizes of a recipe's base, without its weights.

    Args:
        path: `model.path`: a directory with config.json, or a published hub name.

    Returns:
        None for a hub name that is not one of `PUBLISHED`: its config.json is not known before it is downloaded.

    Raises:
        InputError: config.json is there and cannot be used.
    """
    directory = Path(path).expanduser()
    if (directory / "config.json").is_file():
        files = list(directory.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) or None
        return BaseFacts(path, read_shape(directory / "config.json"), str(directory / "config.json"), size)
    if path not in PUBLISHED:
        return None
    file = shipped_dir("data") / "tokenizer" / path.removeprefix("openai/") / "config.json"
    return BaseFacts(path, read_shape(file), "the published config.json", None)


def read_shape(file: Path) -> BaseShape:
    """Read the sizes of a gpt-oss config.json.

    Raises:
        InputError: it cannot be read, is of another architecture, or lacks a size.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}", fix="download or copy the file again") from error
    if not isinstance(config, dict) or config.get("model_type") != "gpt_oss":
        found = config.get("model_type") if isinstance(config, dict) else None
        raise InputError(
            f"{file} describes another architecture: model_type is {found!r}, not 'gpt_oss'",
            why="this toolkit knows gpt-oss only",
        )
    return _shape(config, file)


def _shape(config: Mapping[str, Any], file: Path) -> BaseShape:
    values = {"num_experts_per_tok": config.get("experts_per_token")} | dict(config)
    sizes: dict[str, Any] = {field: values.get(key) for field, key in _KEYS.items()}
    wrong = [_KEYS[field] for field, size in sizes.items() if type(size) is not int or size < 1]
    layer_types: Any = values.get("layer_types")
    if not isinstance(layer_types, list) or len(layer_types) != sizes["num_layers"]:
        wrong.append("layer_types")
    if wrong:
        raise InputError(
            f"{file} lacks {', '.join(wrong)} or has no usable size there",
            fix="use the config.json that was published with the checkpoint",
        )
    return BaseShape(**sizes, full_layers=layer_types.count("full_attention"))
