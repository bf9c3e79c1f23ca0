"""Memory and cores of this machine, as far as this process may use them: a container's limits count.

A process in a memory-limited container (Kubernetes, Docker, Slurm) is killed at its control group's limit however much
memory the host has. Control groups nest, and the tightest limit on the way to the root applies: every parent is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUP_MOUNT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes the largest multiple of a page below 2^63 where no limit is set


@dataclass(frozen=True)
class _MemoryFiles:
    """Names of the files in which a version of the memory controller keeps its figures."""

    limit: str
    usage: str
    inactive_file: str  # a key of memory.stat


_V1 = _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _MemoryFiles("memory.max", "memory.current", "inactive_file")


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process could still allocate without swapping.

    Args:
        device: a GPU: what its driver reports as free. None or the CPU: the host's memory, within the limits of this
            process's control group and all its parents. Page cache that can be dropped at once (`inactive_file`) is not
            counted as used.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    available: int = psutil.virtual_memory().available
    for directory, files, limit in _memory_limits():
        usage = _number(directory / files.usage)
        if usage is not None:
            available = min(available, limit - usage + _inactive_file(directory, files))
    return max(0, available)


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory in bytes: all of it, and what is free or reserved by this process's allocator."""

    name: str
    total_bytes: int
    free_bytes: int


def gpu_memory(device: torch.device) -> GpuMemory:
    """Memory of a GPU, before or after this process has used it."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(torch.cuda.get_device_name(device), total, free + torch.cuda.memory_reserved(device))


def total_memory() -> int:
    """Bytes of memory that this process may use at most: the host's, or its container's limit if that is lower."""
    import psutil

    total: int = psutil.virtual_memory().total
    return min([total, *(limit for _, _, limit in _memory_limits())])


def num_cores() -> int:
    """Logical cores of the machine, at least 1."""
    return os.cpu_count() or 1


def _memory_limits() -> Iterator[tuple[Path, _MemoryFiles, int]]:
    """Every control group of this process that limits its memory: directory, file names, limit in bytes."""
    for root, path, files in _memory_cgroups():
        # A container that shares the host's cgroup namespace sees a path that its own mount does not have: directories
        # that do not exist are passed over, and the mount itself is then the container's group.
        below = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(below), -1, -1):
            directory = root.joinpath(*below[:depth])
            limit = _number(directory / files.limit)
            if limit is not None and limit < _UNLIMITED:
                yield directory, files, limit


def _memory_cgroups() -> Iterator[tuple[Path, str, _MemoryFiles]]:
    """Mount point, this process's path and file names for each version of the memory controller that is in use."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux, or /proc is not mounted
        return
    for line in lines:  # hierarchy:controllers:path
        hierarchy, controllers, path = [*line.split(":", 2), "", ""][:3]
        if "memory" in controllers.split(","):
            yield CGROUP_MOUNT / "memory", path, _V1
        elif hierarchy == "0" and not controllers:
            unified = CGROUP_MOUNT / "unified"  # version 2 beside version 1
            yield unified if unified.is_dir() else CGROUP_MOUNT, path, _V2


def _inactive_file(directory: Path, files: _MemoryFiles) -> int:
    """Bytes of page cache that the kernel drops first; 0 where that is not reported."""
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
        figures = dict(line.split(maxsplit=1) for line in lines if " " in line)
        return int(figures.get(files.inactive_file, 0))
    except (OSError, ValueError):
        return 0


def _number(path: Path) -> int | None:
    """The whole number in a file; None if there is none ("max", or no such file)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
