"""MXFP4: 32 values share one power-of-two scale; each value is a 4-bit float, two per byte.

Code bits are sign, exponent (2), mantissa (1); codes 0..7 are the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 and bit 3 is the
sign. A byte's low nibble is the even element. value = code * 2^(scale byte - 127). Everything here keeps the
checkpoint's orientation, [out, in] with the blocks along `in`; transformers' expert tensors are the transpose.

Sources: OCP Microscaling Formats (MX) v1.0, section 5.3; the published gpt-oss checkpoints' `_blocks` and `_scales`.

Shape suffixes: N rows (out features), G blocks of 32 along a row.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch

from finetune.arch import MXFP4_BLOCK

BLOCK = MXFP4_BLOCK
"""Values that share a scale."""
BYTES_PER_BLOCK = BLOCK // 2
SCALE_BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_CHOSEN_SCALE = 252  # 6 * 2^125 is finite in float32 and bfloat16, 4 * 2^126 is not

# Blocks per iteration; scratch is slightly over 64 bytes per block (4 MiB, 64 MiB). On a CPU the indices should stay
# in cache: one core wrote 6.2, 6.4 and 1.8 GB of bf16 per CPU second into a reused buffer with 2^14, 2^16 and 2^22
# (2026-11-22, [2, 5760, 90, 16]; 13 GB of float32). A GPU needs fewer launches (not measured).
_CPU_PIECE_BLOCKS = 1 << 16
_GPU_PIECE_BLOCKS = 1 << 20


def unpack(blocks: torch.Tensor) -> torch.Tensor:
    """Split bytes into 4-bit codes.

    Args:
        blocks: uint8 [..., G, 16].

    Returns:
        Codes 0..15, uint8 [..., G * 32], in element order.
    """
    _require_blocks(blocks)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1)
    return codes.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Join 4-bit codes into bytes; the inverse of `unpack`.

    Args:
        codes: uint8 [..., G * 32], each 0..15.

    Returns:
        uint8 [..., G, 16].

    Raises:
        ValueError: the last axis is not a multiple of 32, the dtype is not uint8 or a code is above 15.
    """
    if codes.dtype != torch.uint8 or codes.shape[-1] % BLOCK:
        raise ValueError(f"codes must be uint8 with a last axis divisible by 32, not {codes.dtype} {list(codes.shape)}")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError("a code is above 15")
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // BLOCK, BYTES_PER_BLOCK, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def dequantise(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convert packed blocks to values. Exact: bfloat16 and float32 represent every value up to their largest.

    Values past the largest finite number of `dtype` (only with scale bytes from 253) become infinite. The byte 255,
    which OCP reserves for NaN, is read as 2^128, as in transformers' `convert_moe_packed_tensors`, bit for bit.

    Args:
        blocks: uint8 [..., N, G, 16].
        scales: uint8 [..., N, G].
        dtype: bfloat16 or float32.
        out: contiguous tensor of `dtype` to write into, [..., N, G * 32]. None: a new one.

    Returns:
        [..., N, G * 32] of `dtype`: `out` if given. Scratch beyond it stays under 5 MiB on a CPU, 70 MiB on a GPU.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _require_blocks(blocks)
    if scales.dtype != torch.uint8 or scales.shape != blocks.shape[:-1]:
        raise ValueError(f"scales {scales.dtype} {list(scales.shape)} do not belong to blocks {list(blocks.shape)}")
    shape = (*blocks.shape[:-2], blocks.shape[-2] * BLOCK)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous() or out.device != blocks.device:
        raise ValueError(f"out must be a contiguous {dtype} {list(shape)} on {blocks.device}")
    table = _value_pairs(dtype, blocks.device)
    pairs = out.view(-1).view(table.dtype)
    flat_blocks, flat_scales = blocks.reshape(-1, BYTES_PER_BLOCK), scales.reshape(-1, 1)
    piece = _CPU_PIECE_BLOCKS if blocks.device.type == "cpu" else _GPU_PIECE_BLOCKS
    for start in range(0, flat_blocks.shape[0], piece):
        end = start + piece
        index = flat_blocks[start:end].to(torch.int32)
        index |= flat_scales[start:end].to(torch.int32) << 8  # in place: mixed dtypes would cost another int32 copy
        written = pairs[start * BYTES_PER_BLOCK : end * BYTES_PER_BLOCK]
        torch.index_select(table, 0, index.view(-1), out=written)
        del index  # before the next piece makes its own
    return out


def quantise(weights: torch.Tensor, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each value to the nearest one that its block can represent (ties to the even code).

    The scale of a block with largest magnitude a is 2^(floor(log2 a) - 2), which puts a between 4 and 8, and one more
    if a would lie above 7, where the largest code, 6, is further away than 4 of the doubled scale (8). Relative RMS
    error over 200,000 blocks (Gaussian / Laplace / uniform values, seed 0):

        this rule                         0.1125  0.1238  0.1063
        OCP: floor(log2 a) - 2            0.1160  0.1264  0.1127   clips up to a quarter off the largest value
        ceil(log2(a / 6))                 0.1167  0.1322  0.1080   never clips, coarser
        better of two, per block          0.1120  0.1226  0.1062   twice the work for half a per cent

    Values already on a grid are unchanged: `dequantise(*quantise(dequantise(b, s)))` equals
    `dequantise(b, s)`. The bytes may differ in two ways without effect: -0 becomes +0, and a block whose largest
    code is below 4 moves to a smaller scale, where its codes are larger (an all-zero block gets the scale 1).

    Args:
        weights: floating [..., N, K], K a multiple of 32. Rounding works in float32.
        scales: uint8 [..., N, K / 32] to use instead of choosing; values outside a block's range saturate at code 6.

    Returns:
        blocks uint8 [..., N, K / 32, 16] and scales uint8 [..., N, K / 32].

    Raises:
        ValueError: K is not a multiple of 32, a value is not finite, or given scales do not fit.
    """
    if not weights.is_floating_point() or weights.ndim < 1 or weights.shape[-1] % BLOCK:
        raise ValueError(f"weights must be floating with a last axis divisible by 32, not {list(weights.shape)}")
    block_shape = (*weights.shape[:-1], weights.shape[-1] // BLOCK)
    if scales is not None and (scales.dtype != torch.uint8 or scales.shape != block_shape):
        raise ValueError(f"scales must be uint8 {list(block_shape)}, not {scales.dtype} {list(scales.shape)}")
    flat = weights.detach().reshape(-1, BLOCK)
    blocks = torch.empty(flat.shape[0], BYTES_PER_BLOCK, dtype=torch.uint8, device=weights.device)
    chosen = torch.empty(flat.shape[0], dtype=torch.uint8, device=weights.device)
    given = None if scales is None else scales.reshape(-1)
    piece = _CPU_PIECE_BLOCKS if weights.device.type == "cpu" else _GPU_PIECE_BLOCKS
    for start in range(0, flat.shape[0], piece):
        values = flat[start : start + piece].float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError("MXFP4 holds finite values only (in float32), and a weight is infinite or NaN")
        scale = _block_scales(values) if given is None else given[start : start + piece]
        blocks[start : start + piece] = pack(_nearest_codes(values, scale)).squeeze(1)
        chosen[start : start + piece] = scale
    return blocks.view(*block_shape, BYTES_PER_BLOCK), chosen.view(block_shape)


def _block_scales(values: torch.Tensor) -> torch.Tensor:
    """Scale bytes [B] for float32 blocks [B, 32], by the rule in `quantise`."""
    largest = values.abs().amax(dim=-1)
    mantissa, exponent = torch.frexp(largest)  # mantissa in [.5, 1): largest = 8 * mantissa * 2^(exponent - 3)
    exponent = exponent - 3 + (mantissa > 7 / 8).to(exponent.dtype)
    scale = (exponent + SCALE_BIAS).clamp(0, LARGEST_CHOSEN_SCALE).to(torch.uint8)
    return torch.where(largest == 0, torch.full_like(scale, SCALE_BIAS), scale)


def _nearest_codes(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [B, 32] of float32 blocks [B, 32] under scale bytes [B]."""
    inverse = torch.exp2(SCALE_BIAS - scales.to(torch.float64)).unsqueeze(-1)
    # A value past 8 steps is code 6 as well; clamping first keeps the float64 product inside float32.
    scaled = (values * inverse).clamp(-8.0, 8.0).float()
    magnitudes = scaled.abs()
    # Counting the bounds below is 10 times faster than torch.bucketize, whose search mispredicts on real weights.
    codes = torch.zeros(magnitudes.shape, dtype=torch.uint8, device=values.device)
    for bound in _midpoints(values.device):
        codes += (magnitudes > bound).view(torch.uint8)
    negative = (scaled < 0) & (codes > 0)
    return codes | (negative.to(torch.uint8) << 3)


@lru_cache
def _midpoints(device: torch.device) -> torch.Tensor:
    """Upper bounds of codes 0..6 as float32 numbers, inclusive: a tie goes to the even code."""
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(MAGNITUDES)])
    below = torch.nextafter(middles, torch.zeros_like(middles))
    lower_is_even = torch.arange(len(middles)) % 2 == 0
    return torch.where(lower_is_even, middles, below).to(device)


@lru_cache
def _value_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two values of every byte under every scale: [256 * 256], two values of `dtype` viewed as one integer.

    One gather then gives both scaled values of a byte; overflow and subnormals are resolved here, in float64.
    """
    integer = {torch.bfloat16: torch.int32, torch.float32: torch.int64}.get(dtype)
    if integer is None:
        raise ValueError(f"dequantises to bfloat16 or float32, not {dtype}")
    values = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float64)
    byte = torch.arange(256)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=-1)
    factors = torch.tensor([2.0 ** (scale - SCALE_BIAS) for scale in range(256)], dtype=torch.float64)
    scaled = (factors[:, None, None] * pairs).to(torch.float32).to(dtype)
    return scaled.view(-1).view(integer).to(device)


def _require_blocks(blocks: torch.Tensor) -> None:
    if blocks.dtype != torch.uint8 or blocks.ndim < 2 or blocks.shape[-1] != BYTES_PER_BLOCK:
        raise ValueError(f"blocks must be uint8 [..., G, 16], not {blocks.dtype} {list(blocks.shape)}")
