"""Count what a computation on fake CUDA tensors would cost: launches, bytes, arithmetic, host waits, memory.

An operation's bytes are those of its inputs and outputs, each once: what a kernel has to move if nothing stays in a
cache. Views cost nothing. Triton kernels do not pass torch's dispatcher, so `stub_triton` replaces them by objects that
count their arguments.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

THIN = 64  # a product with a side of at most this is limited by memory, not by arithmetic
FOREACH_TENSORS = 40  # tensors that one launch of a multi-tensor kernel takes, roughly
VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "transpose",
        "t",
        "expand",
        "slice",
        "select",
        "permute",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "split",
        "split_with_sizes",
        "as_strided",
        "unbind",
        "_reshape_alias",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "lift_fresh",
        "chunk",
        "diagonal",
        "numpy_T",
        "is_same_size",
        "unfold",
        "view_as",
        "record_stream",
        "device",
        "is_pinned",
        "sym_size",
        "sym_stride",
        "sym_numel",
        "layout",
        "dim",
        "size",
        "stride",
    ]
)
WRITTEN_ONLY = frozenset(["zero_", "fill_", "normal_", "uniform_", "copy_"])


@dataclass
class Cost:
    """Launches, bytes moved and floating-point operations."""

    launches: int = 0
    num_bytes: float = 0.0
    flops: float = 0.0

    def add(self, launches: int, num_bytes: float, flops: float = 0.0) -> None:
        """Add to all three."""
        self.launches += launches
        self.num_bytes += num_bytes
        self.flops += flops


@dataclass(frozen=True)
class Call:
    """Where an operation came from: phase of the step, file and function that asked for it, and its name.

    Attributes:
        rows: smallest side of a matrix product's tile per matrix (routed tokens of an expert), 0 otherwise.
    """

    phase: str
    owner: str
    name: str
    rows: int = 0


@dataclass
class Counts:
    """Everything that was counted.

    Attributes:
        costs: by call.
        waits: copies from device to host, by the line of the product that asked.
        uploads: copies from host to device, likewise.
        peak_bytes: the most that was allocated on the device at once; `peak_at` says when.
    """

    phase: str = "forward"
    costs: defaultdict[Call, Cost] = field(default_factory=lambda: defaultdict(Cost))
    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    allocated: int = 0
    peak_bytes: int = 0
    peak_at: str = ""
    _live: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def forget_costs(self) -> None:
        """Drop what was counted but for the memory that is allocated, and its peak."""
        self.costs.clear()
        self.waits.clear()
        self.uploads.clear()
        self.phase = "forward"

    def track(self, tensors: Iterable[Tensor], name: str) -> None:
        """Take new storages into account; those that are gone are found when a new peak seems near."""
        for tensor in tensors:
            if tensor.device.type != "cuda":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._live and not self._live[storage._cdata][0].expired():
                continue
            if storage._cdata in self._live:
                self.allocated -= self._live[storage._cdata][1]
            self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.allocated += storage.nbytes()
        if self.allocated > self.peak_bytes:
            for key, (reference, num_bytes) in list(self._live.items()):
                if reference.expired():
                    self.allocated -= num_bytes
                    del self._live[key]
            if self.allocated > self.peak_bytes:
                self.peak_bytes, self.peak_at = self.allocated, f"{self.phase}: {name} in {_owner()}"


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _owner() -> str:
    """The innermost file of the product, or function of transformers' gpt-oss, on the stack."""
    for frame in _frames():
        path = frame.f_code.co_filename
        if "/finetune/" in path:
            return path.rsplit("/finetune/", 1)[1]
        if "modeling_gpt_oss" in path:
            return "transformers " + frame.f_code.co_name
    return "autograd"


def _line() -> str:
    for frame in _frames():
        path = frame.f_code.co_filename
        if "/finetune/" in path:
            return f"{path.rsplit('/finetune/', 1)[1]} {frame.f_code.co_name}"
    return "elsewhere"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Counting(TorchDispatchMode):
    """Counts every operator on fake CUDA tensors inside the `with` block.

    Args:
        counts: receives them.
        attention_flops: floating-point operations of one forward attention kernel: called with heads, head width and
            the window (None: full).
    """

    def __init__(self, counts: Counts, attention_flops: Callable[[int, int, int | None], float]) -> None:
        super().__init__()
        self.counts, self.attention_flops = counts, attention_flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_device = [x for x in tensors if x.device.type == "cuda"]
        wanted = kwargs.get("device")
        is_ours = any(isinstance(x, FakeTensor) for x in tensors) or (
            wanted is not None and torch.device(wanted).type == "cuda"
        )
        if name == "_local_scalar_dense" and on_device:
            self.counts.waits[_line()] += 1
            return _any_number(args[0].dtype)
        if not is_ours:
            with unset_fake_temporarily(), _disable_current_modes():
                return func(*args, **kwargs)
        if name == "nonzero" and on_device:
            self.counts.waits[_line()] += 1
        out = func(*args, **kwargs)
        outputs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        self.counts.track(outputs, name)
        if not self._crosses_the_bus(name, args, out) and not self._is_view(func, name, on_device, outputs):
            self._count(name, args, kwargs, on_device, outputs, len(tensors))
        return out

    def _crosses_the_bus(self, name: str, args: Any, out: Any) -> bool:
        if name not in ("_to_copy", "copy_"):
            return False
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
        if not isinstance(source, Tensor) or source.device == target.device:
            return False
        (self.counts.uploads if target.device.type == "cuda" else self.counts.waits)[_line()] += 1
        return True

    @staticmethod
    def _is_view(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        if name in VIEWS or func.namespace in ("prim", "prims"):
            return True
        if not inputs and not any(x.device.type == "cuda" for x in outputs):
            return True
        if func._schema.is_mutable or not outputs:
            return False
        storages = {x.untyped_storage()._cdata for x in inputs}
        return all(x.untyped_storage()._cdata in storages for x in outputs)

    def _count(
        self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], num_tensors: int
    ) -> None:
        written = sum(map(_bytes, outputs))
        read = sum(_bytes(x) for x in inputs if not (name in WRITTEN_ONLY and x is args[0]))
        if name in ("index", "index_select", "embedding"):
            read = written
        flops, rows = 0.0, 0
        if name in ("mm", "addmm", "bmm", "_grouped_mm"):
            flops, rows, thin = _product(name, args)
            name = f"{name} thin" if thin else name
        elif name.startswith("_flash_attention"):
            flops, name = self._attention(name, args, kwargs)
        launches = max(1, num_tensors // FOREACH_TENSORS) if name.startswith(("_foreach", "_fused")) else 1
        self.counts.costs[Call(self.counts.phase, _owner(), name, rows)].add(launches, read + written, flops)

    def _attention(self, name: str, args: Any, kwargs: Any) -> tuple[float, str]:
        forward = "forward" in name
        query = args[0] if forward else args[1]
        left = kwargs.get("window_size_left", -1)
        flops = self.attention_flops(query.shape[1], query.shape[2], None if left == -1 else left + 1)
        kind = "full" if left == -1 else "window"
        return (flops, f"flash forward {kind}") if forward else (2.5 * flops, f"flash backward {kind}")


def _any_number(dtype: torch.dtype) -> float | bool | int:
    """A value for a host that reads one: finite, not zero."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _product(name: str, args: Any) -> tuple[float, int, bool]:
    """Floating-point operations, routed tokens per matrix, and whether a side is thin."""
    if name == "addmm":
        args = args[1:]
    left, right = args[0], args[1]
    if name == "bmm":
        batch, m, k = left.shape
        return 2.0 * batch * m * k * right.shape[2], 0, min(m, k, right.shape[2]) <= THIN
    m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
    if name == "_grouped_mm":
        experts = right.shape[0] if right.dim() == 3 else args[2].shape[0] if len(args) > 2 else 1
        rows = (m if right.dim() == 3 else k) // max(1, experts)
        return 2.0 * m * k * n, rows, min(m if right.dim() == 2 else k, n) <= THIN
    return 2.0 * m * k * n, 0, min(m, k, n) <= THIN


# Triton


BYTES_OF_KERNEL: dict[str, Callable[[list[Tensor], dict[str, Any]], float]] = {
    # Only the rows that are chosen are read, and as many are written.
    "gather_kernel": lambda tensors, _: 2 * _bytes(tensors[2]),
    "swiglu_backward_kernel": lambda tensors, options: (
        sum(map(_bytes, tensors)) + _bytes(tensors[0]) - (0 if options["has_lora"] else _bytes(tensors[1]))
    ),
    "combine_kernel": lambda tensors, options: (
        sum(map(_bytes, tensors)) - (0 if options["weighted"] else _bytes(tensors[0]))
    ),
}


@dataclass
class _Stub:
    """Stands for a Triton kernel: counts its launch and checks its arguments."""

    name: str
    counts: Counts

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            tensors = [x for x in args if isinstance(x, Tensor)]
            elsewhere = [x.device for x in tensors if x.device.type != "cuda"]
            if elsewhere:
                raise ValueError(f"{self.name} is given a tensor on {elsewhere[0]}")
            if any(size > 65_535 for size in grid[1:]):
                raise ValueError(f"{self.name} has a grid of {grid}: CUDA allows 65,535 along the second axis")
            num_bytes = BYTES_OF_KERNEL.get(self.name, lambda tensors, _: sum(map(_bytes, tensors)))(tensors, options)
            flops = float(options.get("flops", 0.0))
            self.counts.costs[Call(self.counts.phase, "triton", self.name)].add(1, num_bytes, flops)

        return launch


@contextmanager
def stub_triton(modules: Iterable[ModuleType], counts: Counts) -> Iterator[None]:
    """Replace the Triton kernels of modules by counters."""
    replaced = [
        (module, name, kernel)
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and hasattr(kernel, "__getitem__")
    ]
    for module, name, _ in replaced:
        setattr(module, name, _Stub(name, counts))
    try:
        yield
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)
