"""Headers of safetensors files, checked against the files: a broken file is named with what is wrong with it.

A safetensors file is 8 bytes with the header's length (little-endian), the header in JSON, and the data to the end.
Source: the format description in the safetensors README.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.arch import DTYPE_BYTES
from finetune.errors import InputError

_LENGTH_BYTES = 8
_LONGEST_NAME = 255  # bytes, on every file system in use
_LARGEST_HEADER = 100_000_000  # the safetensors library refuses longer ones
_FETCH_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a safetensors file.

    Attributes:
        file: name of its shard.
        dtype: as safetensors writes it, such as `BF16`.
        shape: its sizes.
        num_bytes: bytes in the file.
        offset: of these bytes from the file's start.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    offset: int


def plain_file_name(name: object, where: Path) -> str:
    """Require a file name without folders, so that no list of files names a path outside its directory.

    Raises:
        InputError: it is not one.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise InputError(f"{where} names {name!r}, which is not a file beside it")
    if "\0" in name or len(os.fsencode(name.encode("utf-8", "replace"))) > _LONGEST_NAME:
        raise InputError(f"{where} names {name[:80]!r}, which no file can be called")
    return name


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read a safetensors header and check it against the file's size.

    Args:
        path: the file; only its first kilobytes are read.

    Returns:
        Tensor name -> entry, in the order of the data.

    Raises:
        InputError: the file is truncated, has bytes too many, or is not a safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else -1
            if not 0 < length <= _LARGEST_HEADER:
                raise InputError(
                    f"{path} is not a safetensors file", why=_describe_start(start, size), fix=_FETCH_AGAIN
                )
            header = file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(header) < length:
        raise InputError(f"{path} is truncated inside its header ({size:,} bytes)", fix=_FETCH_AGAIN)
    data_bytes = size - _LENGTH_BYTES - length
    return _entries(path, header, data_bytes)


def _entries(path: Path, header: bytes, data_bytes: int) -> dict[str, TensorEntry]:
    try:
        listed = json.loads(header, object_pairs_hook=_without_repeats)
        metadata = listed.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("__metadata__ has something else than text")
        spans = sorted((*map(int, item["data_offsets"]), name) for name, item in listed.items())
        entries = {}
        for begin, end, name in spans:
            dtype, shape = str(listed[name]["dtype"]), tuple(map(int, listed[name]["shape"]))
            if min(begin, end - begin, *shape, 0) < 0:
                raise ValueError(f"{name} has a negative size")
            entries[name] = TensorEntry(path.name, dtype, shape, end - begin, _LENGTH_BYTES + len(header) + begin)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} has a broken safetensors header ({error})", fix=_FETCH_AGAIN) from error
    needed = 0
    for begin, end, name in spans:
        entry = entries[name]
        width = DTYPE_BYTES.get(entry.dtype)
        if begin != needed or (width is not None and end - begin != width * math.prod(entry.shape)):
            raise InputError(f"{path}: the header's place for {name} does not fit its size", fix=_FETCH_AGAIN)
        needed = end
    if needed != data_bytes:
        state = "truncated" if data_bytes < needed else "longer than its header says"
        raise InputError(
            f"{path} is {state}: it has {data_bytes:,} bytes of data where the header names {needed:,}",
            fix=_FETCH_AGAIN,
        )
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless a key is given twice: readers would take different tensors."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)[:80]!r} is in it twice")
    return found


def _describe_start(start: bytes, size: int) -> str:
    if start.startswith(b"version "):
        return "it looks like a Git LFS pointer: the weights were not downloaded (`git lfs pull`)"
    return f"its first bytes are not a header's length ({size:,} bytes in all)"


def join(items: Sequence[str], limit: int = 5) -> str:
    """Join names for a message: the first few, and how many more there are.

    >>> join(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    shown = ", ".join(items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown
