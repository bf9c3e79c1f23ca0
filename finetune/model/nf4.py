"""NF4 as bitsandbytes defines it, through its own functions: 16 levels, one float32 scale for 64 weights.

gpt-oss publishes its experts in MXFP4, so NF4 experts are rounded twice and larger (4.5 bits a weight, not 4.25). NF4
pays where the checkpoint is in bfloat16: the attention projections.

A block is 64 consecutive weights of one matrix [out, in], row after row. bitsandbytes is always given blocks as rows
[blocks, 64]: its CPU kernel (0.50.2) reads wrong scales when a row is no whole number of blocks (docs/log.md).
bitsandbytes is imported when an option asks for it; most runs do not need it.

Shape legend: B blocks of 64.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.errors import MachineError

NF4_BLOCK = 64


def import_bitsandbytes(wanted_by: str, instead: str) -> ModuleType:
    """Import bitsandbytes, or name the option that needs it.

    Args:
        wanted_by: the recipe's key and value, for the message.
        instead: the setting that does without it.

    Raises:
        MachineError: it is not installed.
    """
    without_kernel_advice()
    try:
        import bitsandbytes
    except ImportError as error:
        raise MachineError(
            f"{wanted_by} needs bitsandbytes, which cannot be imported",
            why=str(error),
            fix=f"pip install bitsandbytes, or set {instead}",
        ) from error
    return bitsandbytes


def without_kernel_advice() -> None:
    """Suppress one line that bitsandbytes logs when imported on a CPU with AVX512-BF16; call before importing it.

    It advises to install a package that downloads a matrix product from the hub. Nothing here calls that product, and
    the line reads like a failure. Every other line of bitsandbytes is kept.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_kernel_advice)


def _is_no_kernel_advice(record: logging.LogRecord) -> bool:
    return "from kernels-community" not in str(record.msg)


def _functional() -> Any:
    instead = "model.expert_storage=mxfp4 and model.attention_storage=compute"
    return import_bitsandbytes("nf4 storage", instead).functional


def quantise_nf4(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to NF4.

    Args:
        weights: [out, in], float32 or bfloat16; out x in a multiple of 64.

    Returns:
        Codes uint8 [out, in / 2], the high nibble first, and scales float32 [B], the largest magnitude of each block.

    Raises:
        ValueError: the matrix is no whole number of blocks.
        MachineError: bitsandbytes is not installed.
    """
    if weights.numel() % NF4_BLOCK or weights.shape[-1] % 2:
        raise ValueError(f"{list(weights.shape)} is no whole number of blocks of {NF4_BLOCK}")
    rows = weights.contiguous().view(-1, NF4_BLOCK)
    codes, state = _functional().quantize_4bit(rows, blocksize=NF4_BLOCK, quant_type="nf4")
    return codes.view(*weights.shape[:-1], weights.shape[-1] // 2), state.absmax


def dequantise_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights from their codes, as bitsandbytes gives them for a bfloat16 weight.

    Args:
        codes: uint8 [..., in / 2].
        scales: float32, one for each 64 weights, in the order of the weights.
        dtype: of the result; bfloat16 values in any case.

    Returns:
        [..., in].
    """
    functional = _functional()
    rows = torch.Size((scales.numel(), NF4_BLOCK))
    state = functional.QuantState(
        scales.reshape(-1), shape=rows, blocksize=NF4_BLOCK, quant_type="nf4", dtype=torch.bfloat16
    )
    weights: Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return weights.view(*codes.shape[:-1], codes.shape[-1] * 2).to(dtype)


@dataclass(frozen=True)
class Nf4Experts:
    """E frozen linear maps in NF4, a `finetune.kernels.experts.FrozenExperts`.

    Attributes:
        codes: uint8 [E, out, in / 2].
        scales: float32 [E, out · in / 64].
        bias: [E, out], in the compute dtype.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor

    def dequantised(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Weights of experts `first` to `last` (exclusive) as [C, out, in]."""
        return dequantise_nf4(self.codes[first:last], self.scales[first:last], dtype)


class Nf4Linear(nn.Linear):
    """A frozen linear map whose `weight` is NF4 codes, with their scales in `weight_scales`.

    Args:
        base: the map it replaces, which gives the sizes; its weight may be on the meta device.
    """

    weight_scales: Tensor

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        out, device = base.out_features, base.weight.device
        codes = torch.empty(out, base.in_features // 2, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = torch.empty(out * base.in_features // NF4_BLOCK, device=device)
        self.register_buffer("weight_scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return frozen_linear(x, self.weight, self.bias, self.weight_scales)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    """x W^T + bias with a weight that is never trained.

    Args:
        x: [..., in].
        weight: [out, in] in x's dtype, or NF4 codes uint8 [out, in / 2].
        bias: [out] or None.
        scales: of the codes. None: `weight` is not NF4.

    Returns:
        [..., out]. NF4 weights are dequantised again in the backward pass: nothing dequantised is saved for it.
    """
    if scales is None:
        return F.linear(x, weight, bias)
    out: Tensor = _Nf4Product.apply(x, weight, scales)
    return out if bias is None else out + bias


class _Nf4Product(torch.autograd.Function):
    """x W^T for codes; the gradient reaches x alone."""

    @staticmethod
    def forward(ctx, x, codes, scales):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes, scales)
        return F.linear(x, dequantise_nf4(codes, scales, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        codes, scales = ctx.saved_tensors
        return grad_out @ dequantise_nf4(codes, scales, grad_out.dtype), None, None
