"""Files that are whole or absent, their SHA-256, JSON with errors that name the file, and seeds made from words.

Free of torch at import, so that every package and every command may use it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.errors import ConfigError, InputError, MachineError

if TYPE_CHECKING:
    import torch

JsonObject = Mapping[str, Any]
"""A JSON object as read from a file, before its fields are checked; or one that is about to be written."""

PARTIAL = ".partial"
"""Ends the name of every file and directory that is still being written."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Seeds


def seed_of(*words: object) -> int:
    """A seed for torch: the first 8 bytes of the SHA-256 of the words joined by spaces, little-endian, signed.

    >>> seed_of(0, "step", 3, "process", 1) == seed_of("0 step 3 process 1")
    True
    """
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def seeded_generator(*words: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws depend on the words alone, not on the order in which generators are made.

    Args:
        words: what the draws are for, such as a seed and a parameter's name; see `seed_of`.
        device: where the generator draws.
    """
    import torch

    return torch.Generator(device).manual_seed(seed_of(*words))


# One writer at a time

_HELD: dict[Path, int] = {}  # targets that this process has locked, and how many blocks are inside


@contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Lock a file or directory that is about to be written, until the end of the block, after its final rename.

    The lock is `.NAME.lock` beside the target and says who holds it. It is the kernel's and ends with the process,
    however it ends; inside one process the block may be entered again.

    Raises:
        ConfigError: another process writes it.
        MachineError: the lock cannot be made.
    """
    target = target.absolute()
    if target in _HELD:
        _HELD[target] += 1
        try:
            yield
        finally:
            _HELD[target] -= 1
        return
    path = target.with_name(f".{target.name}.lock")
    file = _locked(path, target)
    try:
        _HELD[target] = 1
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": " ".join(sys.argv),
            "since": time.ctime(),
        }
        file.truncate(0)
        file.write(json.dumps(holder))
        file.flush()
        yield
    finally:
        del _HELD[target]
        path.unlink(missing_ok=True)  # while it is still locked: the next one makes a new file
        file.close()


def _locked(path: Path, target: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = _holder(file.read())
                file.close()
                raise ConfigError(
                    f"{target} is being written by {holder}",
                    why="two commands that write the same files would mix them",
                    fix="wait for it, stop it, or choose another place",
                ) from None
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
            file.close()  # its holder removed it between our opening and locking it
    except OSError as error:
        raise MachineError(
            f"cannot lock {target}: {error.strerror}", fix=fix_for(error, "choose another place")
        ) from error


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on {found['host']} since {found['since']}: {found['command']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


# Files that are replaced in one step


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; at the end of the block the file is flushed to disk and takes the place of `path`.

    A reader or a kill meets the old file or the new one, never half of one. If the block fails, `path` stays as it was
    and nothing is left behind. The parent directory is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")  # two processes may write the same file
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_left_over(path: Path) -> None:
    """Remove unfinished files of processes that were killed while they wrote this file."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        pid = partial.name.removesuffix(PARTIAL).rpartition(".")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            partial.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step, see `replaced_file`."""
    with replaced_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 file in one step, see `replaced_file`."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step: two spaces of indentation, keys in the order given, a newline at the end."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def staged_directory(
    target: Path,
    what: str = "files",
    *,
    fix: str = "free disk space or choose another place",
    replace: bool = False,
    lock: bool = True,
    mode: int = 0o777,
    file_mode: int | None = None,
) -> Iterator[Path]:
    """Give a directory to write into; at the end of the block it is flushed to disk and gets its final name.

    It is `NAME.partial` beside the target, which is locked meanwhile (`only_writer`): one that is there already was
    left by a process that was killed. If the block fails it is removed and the target stays as it was.

    Args:
        target: the final directory.
        what: is written, for the error message.
        fix: what to do when it cannot be written.
        replace: an existing target is removed just before the rename; otherwise it is an error, unless it is empty.
        lock: False where the caller has locked what the target is in.
        mode: permissions of the directory.
        file_mode: permissions of its files, since safetensors writes for the owner only. None: as they were written.

    Raises:
        ConfigError: another process writes the target.
        InputError: the target exists.
        MachineError: it cannot be written, or the disk is full.
    """
    with only_writer(target) if lock else nullcontext():
        yield from _staged(target, what, fix, replace, mode, file_mode)


def _staged(target: Path, what: str, fix: str, replace: bool, mode: int, file_mode: int | None) -> Iterator[Path]:
    if not replace and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists already", fix="choose another directory or remove it")
    partial = target.with_name(target.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=mode)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                if file_mode is not None:
                    path.chmod(file_mode)
                flush(path)  # what the rename makes visible must be on the disk
        flush(partial)
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        flush(target.parent)
    except Exception as error:
        if not is_write_failure(error):
            raise
        raise MachineError(f"cannot write {what} to {target}: {error}", fix=fix_for(error, fix)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Put a file's content, or a directory's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_write_failure(error: BaseException) -> bool:
    """Whether an error says that a file could not be written: a full disk reaches us as OSError or SafetensorError."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def fix_for(error: BaseException, full_disk: str) -> str:
    """What to do about a file that could not be written: by the error's number, `full_disk` for all others."""
    match getattr(error, "errno", None):
        case errno.ENAMETOOLONG:
            return "choose a shorter name: most file systems take 255 bytes, and unfinished files have longer names"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "choose a place that you may write to, or change its permissions"
        case errno.ENOTDIR | errno.EEXIST:
            return "choose another place: part of the path is a file"
        case errno.ENOENT:
            return "choose another place: a directory of the path is gone, or a link leads nowhere"
    return full_disk


def refuse_existing(out: Path) -> None:
    """Raise ConfigError if there is something at `out`."""
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{out} exists already",
            why="an export never overwrites anything",
            fix="give another --out, or remove it first",
        )


# JSON


def read_json(path: Path, what: str = "a JSON file of this tool", fix: str | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        what: it should be, for the error message.
        fix: what to do if it is not that.

    Raises:
        InputError: the file is missing, cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}", why=f"it should be {what}", fix=fix
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}", why=f"it should be {what}", fix=fix) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f"{path} holds a JSON {kind}, not an object", why=f"it should be {what}", fix=fix)
    return content
