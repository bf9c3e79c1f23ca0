"""Frozen layers of a base sharded over ranks as bytes; each rank gathers the layer that it is about to compute.

The frozen tensors of a layer, of whatever dtype (packed experts are uint8), are concatenated to one array of bytes, of
which rank r of N stores the r-th part. Two buffers, allocated once, receive whole layers in turn: while one layer
computes, the next one is gathered. The model's tensors are views into these buffers, so kernels read them like any
other. Gathering packed experts moves 4.25 bits a weight.

Why the engines do not shard the base: docs/guide/distributed.md.

All ranks must gather the same layers in the same order, or they would wait for each other for ever; they do, since each
runs the same model forward and backward as often as the others.
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
    """Place of a tensor in its layer's bytes."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, layer_bytes: Tensor) -> Tensor:
        """The tensor, as a view of uint8 [bytes]."""
        # `.data`: refilling a buffer is no in-place change that autograd should object to. `gather` has restored the
        # bytes that a backward pass reads before it.
        return layer_bytes[self.start : self.start + self.num_bytes].data.view(self.dtype).view(self.shape)


class ShardedLayers:
    """Receives a base's tensors while it is read, stores this rank's shards, and gathers layers when they are needed.

    Args:
        rank, world_size: of this process.
        device: of shards and buffers.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.stored: list[Tensor] = []
        self._places: list[dict[str, _Place]] = []
        self._open: dict[str, Tensor] = {}
        self._buffers: list[Tensor] = []
        self._gathered: list[int | None] = [None] * NUM_BUFFERS
        self._pending: list[Any] = [None] * NUM_BUFFERS
        self._last, self._direction = 0, 1
        self._order: list[int] = []

    def is_layer_tensor(self, name: str) -> bool:
        """Whether a tensor belongs to a layer."""
        return _LAYER.match(name) is not None

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors of a layer; those of one layer come one after another.

        Args:
            tensors: by name, such as `model.layers.3.mlp.experts.down_proj_blocks`, on the CPU, in the dtype in which
                they are computed with.
        """
        for name, tensor in tensors.items():
            if self._open and _layer_of(next(iter(self._open))) != _layer_of(name):
                self._seal()
            self._open[name] = tensor

    def finish(self) -> dict[str, Tensor]:
        """Allocate the buffers, after the last tensor.

        Returns:
            Tensors of the model by name: views that are valid while their layer is gathered.
        """
        self._seal()
        size = max(shard.numel() for shard in self.stored) * self.world_size
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(NUM_BUFFERS)]
        views = {}
        for layer, shard, places in zip(self._order, self.stored, self._places, strict=True):
            whole = self._whole(layer, shard)
            views.update({name: place.view(whole) for name, place in places.items()})
        in_order = sorted(range(len(self._order)), key=self._order.__getitem__)
        self.stored = [self.stored[number] for number in in_order]
        return views

    def attach(self, model: GptOssForCausalLM) -> None:
        """Gather each layer before its forward pass, its recomputation and its backward pass."""
        for number, layer in enumerate(model.model.layers):
            self._attach_to(layer, number)

    def _attach_to(self, layer: nn.Module, number: int) -> None:
        def before_forward(_module: nn.Module, _inputs: Any) -> None:
            self.gather(number)

        def after_forward(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(before_backward)

        def before_backward(_grad: Tensor) -> None:
            self.gather(number)

        layer.register_forward_pre_hook(before_forward, prepend=True)
        layer.register_forward_hook(after_forward)

    def gather(self, layer: int) -> None:
        """Gather a layer, and start gathering the next one in the current direction. Every rank must call it."""
        if layer != self._last:
            self._direction = 1 if layer > self._last else -1
        self._last = layer
        self._start_gather(layer)
        self._wait_for(layer % NUM_BUFFERS)
        if 0 <= layer + self._direction < len(self.stored):
            self._start_gather(layer + self._direction)

    def gather_layer_of(self, name: str) -> None:
        """Gather the layer that a tensor belongs to, if it belongs to one."""
        if self.is_layer_tensor(name):
            self.gather(_layer_of(name))

    def describe(self) -> str:
        """One line for the log: the bytes on this rank."""
        here, gathered = sum(map(len, self.stored)) / 2**20, sum(map(len, self._buffers)) / 2**20
        return (
            f"base layers: sharded over {self.world_size} ranks as bytes, {here:,.1f} MiB on this one of "
            f"{here * self.world_size:,.1f} MiB, and {gathered:,.1f} MiB for {NUM_BUFFERS} gathered layers"
        )

    def _seal(self) -> None:
        """Concatenate the open layer's tensors and store this rank's part."""
        places: dict[str, _Place] = {}
        end = 0
        for name, tensor in sorted(self._open.items()):
            places[name] = _Place(end, tensor.shape, tensor.dtype)
            end += math.ceil(places[name].num_bytes / ALIGNMENT) * ALIGNMENT
        part = math.ceil(end / self.world_size / ALIGNMENT) * ALIGNMENT
        whole = torch.zeros(part * self.world_size, dtype=torch.uint8)
        for name, place in places.items():
            place.view(whole).copy_(self._open[name])
        self.stored.append(whole[self.rank * part : (self.rank + 1) * part].clone().to(self.device))
        self._places.append(places)
        self._order.append(_layer_of(next(iter(self._open))))
        self._open = {}

    def _whole(self, layer: int, shard: Tensor) -> Tensor:
        return self._buffers[layer % NUM_BUFFERS][: shard.numel() * self.world_size]

    def _start_gather(self, layer: int) -> None:
        buffer = layer % NUM_BUFFERS
        if self._gathered[buffer] == layer:
            return
        self._wait_for(buffer)
        shard = self.stored[layer]
        # Begins after everything queued on the device so far, so nothing still reads the buffer.
        self._pending[buffer] = _all_gather(self._whole(layer, shard), shard, async_op=True)
        self._gathered[buffer] = layer

    def _wait_for(self, buffer: int) -> None:
        if self._pending[buffer] is not None:
            self._pending[buffer].wait()
            self._pending[buffer] = None


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    assert match is not None
    return int(match[1])
