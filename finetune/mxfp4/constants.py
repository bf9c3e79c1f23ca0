"""Sizes of an MXFP4 block, for code that must not import torch."""

from __future__ import annotations

BLOCK = 32  # values that share a scale
BYTES_PER_BLOCK = BLOCK // 2
SCALE_BIAS = 127
