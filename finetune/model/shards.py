"""The frozen layers of a base as bytes, dealt over processes; each gathers the layer that it is about to need.

A layer's frozen tensors, of whatever dtype (packed experts are uint8), lie behind one another in one run of bytes, of
which process r of N keeps the r-th part. Two buffers, made once, take whole layers in turn: while one layer computes,
the next one arrives. The model's tensors are views into these buffers, so a kernel reads them as it would read its own.
Every byte that arrives is the checkpoint's; gathering packed experts moves 4.25 bits a weight.

Why not let the engines deal out the base: docs/guide/distributed.md.

All processes must ask for the same layers in the same order, or they would wait for each other for ever; they do, since
each runs the same model forward and backward as often as the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GptOssForCausalLM

# The older name warns in torch 2.13; the newer one is not in 2.11.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

ALIGNMENT = 256  # bytes; kernels load 16 at a time, and DMA likes whole lines
NUM_BUFFERS = 2
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its layer's bytes."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, layer_bytes: Tensor) -> Tensor:
        """The tensor, as a view of uint8 [bytes]."""
        # `.data`: a buffer that is filled anew is no in-place change that autograd should object to. What a backward
        # pass reads is what `hold` has brought back before it.
        return layer_bytes[self.start : self.start + self.num_bytes].data.view(self.dtype).view(self.shape)


class ShardedLayers:
    """Takes a base's tensors while it is read, keeps this process's share, and gathers layers when they are needed.

    Args:
        rank, count: this process, and how many there are.
        device: where shares and buffers live.
    """

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count, self.device = rank, count, device
        self.shares: list[Tensor] = []
        self._places: list[dict[str, _Place]] = []
        self._open: dict[str, Tensor] = {}
        self._buffers: list[Tensor] = []
        self._held: list[int | None] = [None] * NUM_BUFFERS
        self._arriving: list[Any] = [None] * NUM_BUFFERS
        self._last, self._direction = 0, 1
        self._order: list[int] = []

    def takes(self, name: str) -> bool:
        """Whether a tensor belongs to a layer."""
        return _LAYER.match(name) is not None

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors of a layer; those of one layer come one after the other.

        Args:
            tensors: by name, such as `model.layers.3.mlp.experts.down_proj_blocks`, on the CPU, in the dtype in which
                they are computed with.
        """
        for name, tensor in tensors.items():
            if self._open and _layer_of(next(iter(self._open))) != _layer_of(name):
                self._seal()
            self._open[name] = tensor

    def finish(self) -> dict[str, Tensor]:
        """After the last tensor: make the buffers.

        Returns:
            By name, what the model is to hold: views that are right while their layer is held.
        """
        self._seal()
        size = max(share.numel() for share in self.shares) * self.count
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(NUM_BUFFERS)]
        views = {}
        for layer, share, places in zip(self._order, self.shares, self._places, strict=True):
            whole = self._whole(layer, share)
            views.update({name: place.view(whole) for name, place in places.items()})
        in_order = sorted(range(len(self._order)), key=self._order.__getitem__)
        self.shares = [self.shares[number] for number in in_order]
        return views

    def attach(self, model: GptOssForCausalLM) -> None:
        """Hold each layer before its forward pass, its recomputation and its backward pass."""
        for number, layer in enumerate(model.model.layers):
            self._attach_to(layer, number)

    def _attach_to(self, layer: nn.Module, number: int) -> None:
        def before_forward(_module: nn.Module, _inputs: Any) -> None:
            self.hold(number)

        def after_forward(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(before_backward)

        def before_backward(_grad: Tensor) -> None:
            self.hold(number)

        layer.register_forward_pre_hook(before_forward, prepend=True)
        layer.register_forward_hook(after_forward)

    def hold(self, layer: int) -> None:
        """Make a layer's views right, and send for its neighbour in the direction of travel. Every process calls it."""
        if layer != self._last:
            self._direction = 1 if layer > self._last else -1
        self._last = layer
        self._send_for(layer)
        self._await(layer % NUM_BUFFERS)
        if 0 <= layer + self._direction < len(self.shares):
            self._send_for(layer + self._direction)

    def hold_layer_of(self, name: str) -> None:
        """Hold the layer that a tensor belongs to, if it belongs to one."""
        if self.takes(name):
            self.hold(_layer_of(name))

    def describe(self) -> str:
        """What this process holds, in words."""
        here, gathered = sum(map(len, self.shares)), sum(map(len, self._buffers))
        return (
            f"base layers: dealt over {self.count} processes as bytes, {here / 2**20:,.1f} MiB here of "
            f"{here * self.count / 2**20:,.1f} MiB, and {gathered / 2**20:,.1f} MiB for {NUM_BUFFERS} gathered layers"
        )

    def _seal(self) -> None:
        """Lay the open layer's tensors behind one another and keep this process's part."""
        places: dict[str, _Place] = {}
        end = 0
        for name, tensor in sorted(self._open.items()):
            places[name] = _Place(end, tensor.shape, tensor.dtype)
            end += math.ceil(places[name].num_bytes / ALIGNMENT) * ALIGNMENT
        part = math.ceil(end / self.count / ALIGNMENT) * ALIGNMENT
        whole = torch.zeros(part * self.count, dtype=torch.uint8)
        for name, place in places.items():
            place.view(whole).copy_(self._open[name])
        self.shares.append(whole[self.rank * part : (self.rank + 1) * part].clone().to(self.device))
        self._places.append(places)
        self._order.append(_layer_of(next(iter(self._open))))
        self._open = {}

    def _whole(self, layer: int, share: Tensor) -> Tensor:
        return self._buffers[layer % NUM_BUFFERS][: share.numel() * self.count]

    def _send_for(self, layer: int) -> None:
        buffer = layer % NUM_BUFFERS
        if self._held[buffer] == layer:
            return
        self._await(buffer)
        share = self.shares[layer]
        # Begins after everything that the device was given to do so far, so nobody still reads the buffer.
        self._arriving[buffer] = _all_gather(self._whole(layer, share), share, async_op=True)
        self._held[buffer] = layer

    def _await(self, buffer: int) -> None:
        if self._arriving[buffer] is not None:
            self._arriving[buffer].wait()
            self._arriving[buffer] = None


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    assert match is not None
    return int(match[1])
