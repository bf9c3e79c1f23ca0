"""How much memory this machine would give a process: what is available, or what its container allows."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes(cgroup: Path = _CGROUP) -> int:
    """Bytes that a new process could take without swapping.

    Args:
        cgroup: where the container's limits stand (cgroup v2), if there are any.
    """
    available = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or "max": no limit
        return available
    return max(0, min(available, limit - used))
