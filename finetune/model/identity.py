"""Verification of a base: SHA-256 of its files, and its identity.

The identity is a hash over every tensor's name, dtype, shape and bytes. Two checkpoints that differ only in how they
are split into files have the same one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from finetune.errors import InputError
from finetune.files import read_json, sha256_of
from finetune.log import Progress
from finetune.model.checkpoint import CHECKSUMS_FILE, Checkpoint
from finetune.model.headers import TensorEntry, join, plain_file_name

_PIECE_BYTES = 16 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FETCH_AGAIN = "download or copy the checkpoint again"


def tensor_digest(tensor: torch.Tensor) -> str:
    """Hash a tensor's bytes: row-major, little-endian, as safetensors stores them.

    Args:
        tensor: any dtype and shape, on any device. A contiguous one on the CPU is hashed without a copy.

    Returns:
        SHA-256 in hexadecimal.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def identity(entries: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Hash a set of tensors.

    Args:
        entries: name, dtype as safetensors writes it (`BF16`, `U8`, `F32`), shape and `tensor_digest` of each tensor,
            in any order.

    Returns:
        SHA-256 in hexadecimal over the sorted lines `name dtype AxBxC digest`, each ended by a newline.
    """
    lines = sorted(f"{name} {dtype} {'x'.join(map(str, shape))} {digest}\n" for name, dtype, shape, digest in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def checkpoint_identity(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """Hash a checkpoint on disk.

    Args:
        checkpoint: opened.
        progress: advanced in MiB; its total is set here.

    Returns:
        The `identity` of its tensors.
    """
    stored = checkpoint.stored
    if progress is not None:
        progress.total = sum(entry.num_bytes for entry in stored.values()) >> 20
    entries, done = [], 0
    with ThreadPoolExecutor(_hash_threads()) as pool:
        digests = pool.map(lambda entry: _stored_digest(checkpoint.directory, entry), stored.values())
        for name, digest in zip(stored, digests, strict=True):
            entries.append((name, stored[name].dtype, stored[name].shape, digest))
            done += stored[name].num_bytes
            if progress is not None:
                progress.show(done >> 20)
    return identity(entries)


def verify_checksums(checkpoint: Checkpoint, progress: Progress | None = None) -> bool:
    """Compare a checkpoint's files with `checksums.json`, or with the names that the hub's cache gives them.

    The cache stores a large file as a blob named by its SHA-256, and the snapshot links to it.

    Args:
        checkpoint: opened.
        progress: advanced in MiB; its total is set here.

    Returns:
        Whether there was something to compare with. Published checkpoints have no checksums.json, so a copy of one
        outside the hub's cache has nothing.

    Raises:
        InputError: a file differs or is missing, or checksums.json is not readable.
    """
    directory = checkpoint.directory
    path = directory / CHECKSUMS_FILE
    shards = {entry.file for entry in checkpoint.stored.values()}
    listed = _read_checksums(path) if path.exists() else _cached_digests(directory, shards)
    if not listed:
        return False
    if unlisted := sorted(shards - listed.keys()):
        raise InputError(f"{path} does not list {join(unlisted)}", fix=_FETCH_AGAIN)
    if missing := sorted(name for name in listed if not (directory / name).is_file()):
        raise InputError(f"{directory} lacks {join(missing)}, which {CHECKSUMS_FILE} lists", fix=_FETCH_AGAIN)
    wrong = _differing_files(directory, listed, progress)
    if wrong:
        source, fix = f"{CHECKSUMS_FILE} lists", f"{_FETCH_AGAIN}; if the change was meant, remove {CHECKSUMS_FILE}"
        if not path.exists():
            source, fix = "the hub's cache names it by", f"remove {directory} and download it again"
        raise InputError(
            f"{directory}: {join(wrong)} does not have the sha256 that {source}",
            why="it was bit-flipped or replaced since the checkpoint was written",
            fix=fix,
        )
    return True


def _differing_files(directory: Path, listed: dict[str, str], progress: Progress | None) -> list[str]:
    """Names of the files whose SHA-256 is not the listed one, sorted."""
    sizes = {name: (directory / name).stat().st_size for name in listed}
    if progress is not None:
        progress.total = sum(sizes.values()) >> 20
    done, wrong = 0, []
    with ThreadPoolExecutor(_hash_threads()) as pool:
        jobs = {pool.submit(sha256_of, directory / name): name for name in listed}
        for job in as_completed(jobs):
            name = jobs[job]
            done += sizes[name]
            if job.result() != listed[name]:
                wrong.append(name)
            if progress is not None:
                progress.show(done >> 20, name)
    return sorted(wrong)


def _hash_threads() -> int:
    """Files that are hashed at the same time: hashlib releases the interpreter lock."""
    return min(8, os.cpu_count() or 1)


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


def _cached_digests(directory: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files that are links to blobs of the hub's cache, which are named by it; {} unless all are."""
    digests = {file: (directory / file).resolve().name for file in files if (directory / file).is_symlink()}
    named = len(digests) == len(set(files)) and all(_SHA256.fullmatch(digest) for digest in digests.values())
    return digests if named else {}


def _read_checksums(path: Path) -> dict[str, str]:
    content = read_json(path, "a list of SHA-256 checksums", _FETCH_AGAIN)
    files = content.get("files")
    if content.get("algorithm") != "sha256" or not isinstance(files, dict) or not files:
        raise InputError(f'{path} is not {{"algorithm": "sha256", "files": {{name: digest}}}}', fix=_FETCH_AGAIN)
    return {plain_file_name(name, path): str(digest) for name, digest in files.items()}
