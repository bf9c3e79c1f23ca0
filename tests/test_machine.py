"""Free memory under the limits of control groups of either version, nested ones included."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from finetune import machine
from finetune.adapters.read_back import fits_in_memory
from finetune.arch import Arch
from finetune.cli.preflight import device_budget
from finetune.config.compose import compose
from finetune.config.paths import shipped_dir
from finetune.doctor import check_machine
from finetune.export.survival.effect import fits_in_memory as packed_base_fits
from finetune.machine import free_memory, num_cores, total_memory
from finetune.rounding.probe import experts_at_once

GIB = 2**30
NO_LIMIT_V1 = 9_223_372_036_854_771_712
FAR = 1 << 50  # more than any machine has


class Groups:
    """A made-up tree of control groups and this process's place in it."""

    def __init__(self, root: Path) -> None:
        self.mount, self.own = root / "cgroup", root / "own"
        self.mount.mkdir()
        self.own.write_text("")

    def v2(self, path: str, limit: int | str, used: int, inactive: int | None = None) -> None:
        self._write(self.mount / path, {"memory.max": limit, "memory.current": used}, "inactive_file", inactive)

    def v1(self, path: str, limit: int, used: int, inactive: int | None = None) -> None:
        names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
        self._write(self.mount / "memory" / path, names, "total_inactive_file", inactive)

    @staticmethod
    def _write(directory: Path, values: dict[str, int | str], key: str, inactive: int | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (directory / name).write_text(f"{value}\n")
        if inactive is not None:
            (directory / "memory.stat").write_text(f"anon 5\n{key} {inactive}\nactive_file 7\n")

    def free(self) -> int:
        return free_memory()

    def total(self) -> int:
        return total_memory()


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    class Host:
        total, available = 64 * GIB, 48 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Host)
    made = Groups(tmp_path)
    monkeypatch.setattr(machine, "CGROUP_MOUNT", made.mount)
    monkeypatch.setattr(machine, "OWN_CGROUPS", made.own)
    return made


def test_a_machine_without_groups_gives_what_is_available(groups: Groups) -> None:
    assert groups.free() == 48 * GIB and groups.total() == 64 * GIB
    groups.own.unlink()
    assert groups.free() == 48 * GIB


def test_version_2_in_a_namespace_of_its_own(groups: Groups) -> None:
    groups.own.write_text("0::/\n")
    groups.v2("", "max", 5000)
    assert groups.free() == 48 * GIB
    groups.v2("", 5000, 1000)
    assert groups.free() == 4000 and groups.total() == 5000
    groups.v2("", 5000, 6000)
    assert groups.free() == 0


def test_page_cache_that_can_be_dropped_is_free(groups: Groups) -> None:
    groups.own.write_text("0::/pod\n")
    groups.v2("pod", 5000, 4500, inactive=3000)
    assert groups.free() == 3500
    (groups.mount / "pod" / "memory.stat").write_text("no figures\n")
    assert groups.free() == 500


def test_the_tightest_limit_on_the_way_up_counts(groups: Groups) -> None:
    groups.own.write_text("0::/pod/container/step\n")
    groups.v2("pod", 9000, 2000)
    groups.v2("pod/container", 6000, 1000)
    groups.v2("pod/container/step", "max", 500)
    groups.v2("pod/neighbour", 10, 10)
    assert groups.free() == 5000 and groups.total() == 6000
    groups.v2("pod", 9000, 8000)  # the neighbour fills the pod
    assert groups.free() == 1000


def test_version_1_with_nested_groups(groups: Groups) -> None:
    groups.own.write_text("5:devices:/\n4:cpu,memory:/slurm/job/step\n0::/\n")
    groups.v1("", NO_LIMIT_V1, FAR)
    groups.v1("slurm/job", 8 * GIB, 3 * GIB, inactive=GIB)
    groups.v1("slurm/job/step", NO_LIMIT_V1, 2 * GIB)
    assert groups.free() == 6 * GIB and groups.total() == 8 * GIB


def test_a_container_that_sees_the_host_s_path(groups: Groups) -> None:
    """Docker on version 1: /proc names the host's path, the mount is the container's own group."""
    groups.own.write_text("4:memory:/docker/0123\n")
    groups.v1("", 4 * GIB, GIB)
    assert groups.free() == 3 * GIB


def test_both_versions_side_by_side(groups: Groups) -> None:
    groups.own.write_text("4:memory:/a\n0::/b\n")
    groups.v1("a", 4 * GIB, GIB)
    groups.v2("unified/b", 3 * GIB, GIB)
    assert groups.free() == 2 * GIB


def test_a_path_above_the_namespace_is_cut(groups: Groups) -> None:
    groups.own.write_text("0::/../outside\n")
    groups.v2("", 5000, 1000)
    assert groups.free() == 4000


def test_less_available_than_the_limit_leaves(groups: Groups) -> None:
    groups.own.write_text("0::/\n")
    groups.v2("", 60 * GIB, GIB)
    assert groups.free() == 48 * GIB and groups.total() == 60 * GIB


CPU = torch.device("cpu")


@pytest.mark.parametrize("limit", [1 << 20, 32 * GIB], ids=["small container", "large container"])
def test_every_reader_of_free_memory_respects_the_container(limit: int, groups: Groups) -> None:
    """A pod of 1 MiB on a host with 48 GiB available: nothing that looks at free memory may count on the host's."""
    groups.own.write_text("0::/\n")
    groups.v2("", limit, 0)
    large = limit > GIB
    arch = Arch.read(shipped_dir("data") / "tokenizer" / "gpt-oss-20b" / "config.json")
    tensors = {"w": ("F32", (512, 512))}
    checkpoint = SimpleNamespace(num_bytes=1 << 20, arch=SimpleNamespace(expected_tensors=lambda: tensors))
    base: Any = SimpleNamespace(checkpoint=checkpoint, compute_dtype=torch.float32)
    plan: Any = SimpleNamespace(checkpoint=checkpoint)
    assert fits_in_memory(base) is large  # read-back in a process of its own
    assert packed_base_fits(plan, CPU) is large  # whether the fine-tune survives
    assert (experts_at_once(arch, CPU) > 1) is large  # rounding
    assert device_budget(compose("quickstart", ["model.device=cpu"]).config).num_bytes == limit  # the estimate
    assert f"{limit / GIB:.1f} GiB" in next(iter(check_machine())).found


def test_this_machine() -> None:
    assert 10**8 < free_memory() <= psutil.virtual_memory().total
    assert free_memory() <= total_memory() and num_cores() >= 1
