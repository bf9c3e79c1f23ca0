"""Offload of activation checkpoints to host memory, copied there and back while the GPU computes.

With checkpointing a layer saves its input alone, [B, T, D]: 94 MB for 16k tokens of the large models in bfloat16, times
36 layers. On a GPU each is copied out while its layer runs, and fetched again during the backward pass of the layer
above it, on a separate stream. The host never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class _Offloaded:
    """A tensor offloaded to the host.

    Attributes:
        host: its copy.
        below: the tensor offloaded before it, needed next in the backward pass.
        back: once fetched, the tensor on the device and the event after which its copy is complete.
    """

    host: Tensor
    below: _Offloaded | None
    back: tuple[Tensor, torch.cuda.Event | None] | None = None


class _SideStream:
    """Copies concurrently with the computation on a GPU; on a CPU, where tests run, synchronously."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Copy once all work queued so far is done; returns the event to `join` before the tensors are used again."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def join(self, event: torch.cuda.Event | None) -> None:
        """Make the computation, not the host, wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class CheckpointOffload:
    """Context in which layer inputs that the forward pass saves for the backward pass are offloaded to the host.

    A tensor is freed on the device when the next one is offloaded: by then its copy has had a layer's time. The
    computation waits for the copy before the memory is freed, so the device has two checkpoints at most, however far
    the host runs ahead; `record_stream` would leave that to chance.

    Args:
        device: of the model.
        hidden: D; only tensors [B, T, D] of `dtype` are offloaded.
        dtype: of activations.
    """

    def __init__(self, device: torch.device, hidden: int, dtype: torch.dtype) -> None:
        self.hidden, self.dtype = hidden, dtype
        self._side = _SideStream(device)
        self._newest: _Offloaded | None = None
        self._leaving: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    def __enter__(self) -> CheckpointOffload:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(kind, error, trace)
        self._free_leaving()
        self._newest = None  # the graph owns the offloaded tensors, and frees them

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.ndim != 3 or tensor.shape[-1] != self.hidden or tensor.dtype != self.dtype:
            return tensor
        self._free_leaving()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._leaving = tensor, self._side.copy(tensor, host)
        self._newest = _Offloaded(host, self._newest)
        return self._newest

    def _free_leaving(self) -> None:
        """Free the tensor whose copy was begun last."""
        if self._leaving is not None:
            self._side.join(self._leaving[1])
            self._leaving = None

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Offloaded):
            return packed
        self._fetch(packed)
        assert packed.back is not None
        tensor, event = packed.back
        packed.back = None
        self._side.join(event)
        if packed.below is not None:
            self._fetch(packed.below)
            packed.below = None
        return tensor

    def _fetch(self, offloaded: _Offloaded) -> None:
        if offloaded.back is None:
            tensor = torch.empty(offloaded.host.shape, dtype=offloaded.host.dtype, device=self._side.device)
            offloaded.back = tensor, self._side.copy(offloaded.host, tensor)
