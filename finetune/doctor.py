"""Checks of the machine: Python, packages, GPU, compilers, disk, network, tokenizer; each with a fix.

The checks change nothing, and a failing one does not stop the others.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from finetune.config.paths import cache_dir
from finetune.machine import num_cores, total_memory

PACKAGE = "gpt-oss-finetune"
HUB = "https://huggingface.co"
Status = Literal["ok", "note", "bad"]
# Versions that pass their range and are known to be broken, with the reason.
BROKEN = {("peft", "0.19.0"): "it writes gate_up and down of the experts swapped"}
_SMALL_DISK_GIB = 20
_SMALL_MEMORY_GIB = 8


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: the thing checked.
        status: `ok`; `note` is worth knowing; `bad` stops some command.
        found: description.
        fix: what to do; None if `ok`.
    """

    name: str
    status: Status
    found: str
    fix: str | None = None


def examine() -> list[Finding]:
    """Run every check; a check that fails itself is a finding too."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        check_python, check_packages, check_torch, check_kernels, check_optional, check_tools, check_machine,
        check_disk, check_hub, check_tokenizer,
    )  # fmt: skip
    findings = []
    for check in checks:
        try:
            findings += list(check())
        except Exception as error:  # a check must not hide the others' findings
            name = check.__name__.removeprefix("check_")
            findings.append(Finding(name, "bad", f"cannot be checked: {type(error).__name__}: {error}"))
    return findings


def check_python() -> Iterator[Finding]:
    """Check the version of Python."""
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if good else "bad", f"{version}, {sys.prefix}", None if good else "use 3.11 or newer")
    if sys.platform not in ("linux", "darwin"):
        yield Finding("platform", "bad", sys.platform, "use Linux, macOS (CPU only), or Windows through WSL2")


def check_packages() -> Iterator[Finding]:
    """Check every required package against its range and the known broken versions."""
    for text in importlib.metadata.requires(PACKAGE) or ():
        requirement = Requirement(text)
        if requirement.marker is None:
            yield package_finding(requirement, installed_version(requirement.name), needed=True)


def package_finding(requirement: Requirement, version: str | None, *, needed: bool) -> Finding:
    """Check one package.

    Args:
        requirement: its name and range.
        version: the installed version, or None.
        needed: the toolkit does not run without it.
    """
    name, install = requirement.name, f'python -m pip install "{requirement}" -c constraints.txt'
    if version is None:
        return Finding(name, "bad" if needed else "note", "not installed", install)
    if (reason := BROKEN.get((name.replace("_", "-"), version))) is not None:
        return Finding(name, "note", f"{version}: {reason}", f'python -m pip install "{name}!={version}"')
    if not requirement.specifier.contains(Version(version), prereleases=True):
        return Finding(name, "bad", f"{version}, outside {requirement.specifier}", install)
    return Finding(name, "ok", version)


def installed_version(name: str) -> str | None:
    """Look up the installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_torch() -> Iterator[Finding]:
    """Check torch's build and the GPUs that it finds."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPU only"
            fix = "install a CUDA build of torch (README, Install), or a driver that is new enough for this one"
            yield Finding(
                "GPU", "bad", f"there is an NVIDIA driver, but torch {torch.__version__} ({built}) has none", fix
            )
        else:
            yield Finding("GPU", "note", "none: only tiny models train here", "real models need an Ampere GPU or newer")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        is_old = (properties.major, properties.minor) < (8, 0)
        yield Finding(
            f"GPU {number}",
            "bad" if is_old else "ok",
            f"{properties.name}, sm_{properties.major}{properties.minor}, {free / 2**30:.1f} of {total / 2**30:.1f} "
            f"GiB free, CUDA {torch.version.cuda}",
            "training needs Ampere (sm_80) or newer" if is_old else None,
        )


def check_kernels() -> Iterator[Finding]:
    """Choose the kernels that a 20b run would use here, with reasons."""
    import torch

    from finetune.kernels.choice import AttentionDims, ExpertDims, choose_attention_kernel, choose_expert_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    experts = choose_expert_kernel("auto", ExpertDims(2880, 2880, 16), device, dtype)
    attention = choose_attention_kernel("auto", AttentionDims(64, 8, 64, 128), device, dtype)
    for choice in (experts, attention):
        name, _, text = choice.describe().partition(": ")
        is_slow = device.type == "cuda" and choice.kernel == "reference"
        yield Finding(
            name, "note" if is_slow else "ok", text, "see the reason; training works, slower" if is_slow else None
        )


def check_optional() -> Iterator[Finding]:
    """Check packages that only some options need."""
    wanted = {"bitsandbytes": "8-bit optimisers, nf4", "deepspeed": "zero1 to zero3", "wandb": "logging=wandb"}
    wanted |= {"datasets": "hub data sets", "gguf": "export --to gguf"}
    for name, purpose in wanted.items():
        version = installed_version(name)
        if version is None:
            yield Finding(name, "note", f"not installed; needed for {purpose}", f"python -m pip install {name}")
        else:
            yield Finding(name, "ok", version)


def check_tools() -> Iterator[Finding]:
    """Check the compilers of DeepSpeed and Triton."""
    for tool, purpose in (("ninja", "DeepSpeed's own optimisers"), ("g++", "DeepSpeed and Triton")):
        where = shutil.which(tool)
        fix = f"install it with your system's packages; without it {purpose} cannot compile"
        yield Finding(tool, "ok" if where else "note", where or "not found", None if where else fix)


def check_machine() -> Iterator[Finding]:
    """Check cores, memory and the waiting policy of torch's threads."""
    total = total_memory() / 2**30
    small = total < _SMALL_MEMORY_GIB
    fix = "tests and the demo want 8 GiB; reading a 20b checkpoint wants 16" if small else None
    yield Finding("memory", "note" if small else "ok", f"{total:.1f} GiB, {num_cores()} cores", fix)
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    spins = policy.upper() == "ACTIVE"
    fix = "unset OMP_WAIT_POLICY: waiting threads that spin made steps 20 times slower (docs/log.md)" if spins else None
    yield Finding("OMP_WAIT_POLICY", "note" if spins else "ok", policy, fix)


def check_disk() -> Iterator[Finding]:
    """Check free space for runs, tokens and downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, path in (("runs", Path()), ("token cache", cache_dir(None)), ("hub cache", Path(HF_HUB_CACHE))):
        existing = next(place for place in (path, *path.resolve().parents) if place.exists())
        free = shutil.disk_usage(existing).free / 2**30
        small = free < _SMALL_DISK_GIB
        fix = "gpt-oss-20b is 14 GiB, 120b 61 GiB; a run's checkpoints a few" if small else None
        yield Finding(f"disk, {name}", "note" if small else "ok", f"{free:.0f} GiB free at {path.resolve()}", fix)


def check_hub() -> Iterator[Finding]:
    """Check whether bases and data sets can be downloaded."""
    endpoint = os.environ.get("HF_ENDPOINT", HUB)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set", "unset it to download; local directories work without")
        return
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            yield Finding("hub", "note", f"{endpoint} gives {error.code}", "try later, or use a local directory")
            return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Finding("hub", "note", f"{endpoint} cannot be reached: {reason}", "use a local directory as model.path")
        return
    yield Finding("hub", "ok", f"{endpoint} responds")


def check_tokenizer() -> Iterator[Finding]:
    """Check the shipped vocabulary with a text whose tokens are known."""
    from finetune.data.harmony.tokenizer import harmony_encoding

    tokens = harmony_encoding().encode("hello world", allowed_special=set())
    good = tokens == [24912, 2375]
    fix = "reinstall gpt-oss-finetune: its data files are damaged" if not good else None
    yield Finding("tokenizer", "ok" if good else "bad", "o200k_harmony, 201,088 ids" if good else f"{tokens}", fix)
