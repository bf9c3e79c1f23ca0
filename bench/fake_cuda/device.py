"""Make a CPU build of torch answer as a machine with one CUDA device. Import this before torch.

`guard.cpp` gives autograd a device to ask; the functions here replace what torch's Python side asks the CUDA runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("guard.cpp")


class NoFakeDevice(Exception):
    """Why there can be no fake device here, and what is needed."""


def load_guard() -> None:
    """Compile `guard.cpp` (once per version of torch, into the temporary directory) and load it.

    Raises:
        NoFakeDevice: torch is imported already, is built for CUDA, or there is no compiler.
    """
    if "torch" in sys.modules:
        raise NoFakeDevice("the device guard has to be loaded before torch is imported")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NoFakeDevice("torch is not installed")
    version, root = importlib.metadata.version("torch"), Path(spec.origin).parent
    if "+cpu" not in version and (root / "lib" / "libtorch_cuda.so").exists():
        raise NoFakeDevice(
            f"torch {version} is a CUDA build; fake CUDA tensors need a CPU build, in an environment of its own"
        )
    compiler = shutil.which("g++")
    if compiler is None:
        raise NoFakeDevice("there is no g++ to compile bench/fake_cuda/guard.cpp with")
    key = hashlib.sha256(SOURCE.read_bytes() + version.encode() + str(root).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"finetune-fake-cuda-{key}.so"
    if not library.exists():
        _compile(compiler, root, library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compile(compiler: str, root: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += [f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoFakeDevice(f"g++ failed: {(done.stderr.splitlines() or ['no message'])[0]}")
        made.replace(library)


class _Stream:
    """A stream whose work is done at once."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _other: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def record_event(self, *_: Any) -> object:
        return object()

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def one_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Inside, torch.cuda answers for one device of this compute capability, and fake tensors may be on it."""
    import torch
    import torch.utils._foreach_utils as foreach
    import torch.utils.checkpoint
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def nothing(*_: Any, **__: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_capability", lambda *_: capability),
        (torch.cuda, "get_device_name", lambda *_: "a fake GPU"),
        (torch.cuda, "current_stream", lambda *_: _Stream()),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "stream", nothing),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.random, "fork_rng", nothing),
        (torch.utils.checkpoint, "get_device_states", lambda *_: ([], [])),
        (torch.utils.checkpoint, "set_device_states", lambda *_, **__: None),
        # Without this torch's AdamW and gradient norm take the slow path that unknown kinds of tensor get.
        (foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, FakeTensor]),
        (FakeTensorMode, "avoid_device_init", property(lambda _: True)),
    ]
    before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in answers]
    for owner, name, answer in answers:
        setattr(owner, name, answer)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def properties(gigabytes: float) -> types.SimpleNamespace:
    """What `torch.cuda.get_device_properties` would say of a GPU's memory."""
    return types.SimpleNamespace(total_memory=int(gigabytes * 1e9), name="a fake GPU")
