"""Former place of `finetune.arch`; to be folded into it."""

from __future__ import annotations

from finetune.arch import DTYPE_BYTES, LAYER_TYPES, LayerType
from finetune.arch import Arch as ModelShape

__all__ = ["DTYPE_BYTES", "LAYER_TYPES", "LayerType", "ModelShape"]
