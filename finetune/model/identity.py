"""What makes two bases the same: a hash over every tensor's name, dtype, shape and bytes, however they are sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from finetune import log
from finetune.errors import InputError
from finetune.machine import num_cores
from finetune.model.checkpoint import Checkpoint
from finetune.model.headers import TensorEntry

_PIECE_BYTES = 16 << 20


def tensor_digest(tensor: torch.Tensor) -> str:
    """Hash a tensor's bytes: row-major, little-endian, as safetensors stores them.

    Args:
        tensor: any dtype and shape, on any device. A contiguous one on the CPU is hashed where it lies.

    Returns:
        sha256 in hexadecimal.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def identity(entries: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Hash a set of tensors.

    Args:
        entries: name, dtype as safetensors writes it (`BF16`, `U8`, `F32`), shape and `tensor_digest` of each tensor,
            in any order.

    Returns:
        sha256 in hexadecimal over the sorted lines `name dtype AxBxC digest`, each ended by a newline.
    """
    lines = sorted(f"{name} {dtype} {'x'.join(map(str, shape))} {digest}\n" for name, dtype, shape, digest in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stored_digest(directory: Path, entry: TensorEntry) -> str:
    """`tensor_digest` of a tensor on disk. Not mapped: mapped pages would count as memory, the whole base of them."""
    digest, left = hashlib.sha256(), entry.num_bytes
    piece = memoryview(bytearray(min(_PIECE_BYTES, left)))
    with (directory / entry.file).open("rb", buffering=0) as file:
        file.seek(entry.offset)
        while left:
            count = file.readinto(piece[: min(len(piece), left)])
            if not count:
                raise InputError(f"{directory / entry.file} was cut short while it was read")
            digest.update(piece[:count])
            left -= count
    return digest.hexdigest()


def checkpoint_identity(checkpoint: Checkpoint, progress: log.Progress | None = None) -> str:
    """Hash a checkpoint on disk.

    Args:
        checkpoint: opened.
        progress: moved on in MiB; its total is set here.

    Returns:
        The `identity` of its tensors: equal for two checkpoints that differ only in how they are split into files.
    """
    stored = checkpoint.stored
    if progress is not None:
        progress.total = sum(entry.num_bytes for entry in stored.values()) >> 20
    entries, done = [], 0
    # hashlib lets go of the interpreter lock.
    with ThreadPoolExecutor(max_workers=min(8, num_cores())) as pool:
        digests = pool.map(lambda entry: _stored_digest(checkpoint.directory, entry), stored.values())
        for name, digest in zip(stored, digests, strict=True):
            entries.append((name, stored[name].dtype, stored[name].shape, digest))
            done += stored[name].num_bytes
            if progress is not None:
                progress.show(done >> 20)
    return identity(entries)
