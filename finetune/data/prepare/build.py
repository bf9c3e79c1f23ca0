"""`finetune data prepare`: build a shipped data set from its public source, byte for byte.

A checkout has the medical data; a wheel does not, because the abstracts may not be redistributed. The legal and
the creative data come with both, and are built to prove where they come from. Source files and result are compared
with SHA-256 sums, and anything else is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Literal

from finetune import log
from finetune.config.paths import prepared_dir, shipped_dir
from finetune.data.prepare.creative import FICTION, fiction_records
from finetune.data.prepare.legal import CUAD, cuad_records
from finetune.data.prepare.medical import PUBMEDQA, pubmedqa_records
from finetune.data.prepare.upstream import Upstream, checked
from finetune.errors import ConfigError, InputError
from finetune.files import write_bytes

Domain = Literal["legal", "medical", "creative"]


def prepare(domain: Domain, source: str | None = None, out: Path | None = None) -> Path:
    """Build a data set, unless this installation has it.

    Args:
        domain: which one.
        source: a directory or an http(s) address with the source's files (`Upstream.files`), such as a clone of
            its repository where there is no network. None: GitHub, at a fixed commit.
        out: build it into this file even if the installation has the set.

    Returns:
        `out`, or the file that the set's `shipped://` path refers to from then on.

    Raises:
        ConfigError: `out` exists.
        InputError: a source file is missing or is not the one that the set is made from.
        MachineError: the source cannot be reached.
    """
    match domain:
        case "legal":
            upstream, build = CUAD, cuad_records
        case "medical":
            upstream, build = PUBMEDQA, pubmedqa_records
        case "creative":
            upstream, build = FICTION, fiction_records
    if out is not None and out.exists():
        raise ConfigError(f"{out} already exists", why="nothing is ever overwritten", fix="give another name")
    if out is None and (found := _already_there(upstream)):
        return found
    files = upstream.read(source)
    content = build(files)
    checked(upstream.name, content, upstream.sha256)
    target = out or prepared_dir() / upstream.name
    for path, name in upstream.beside.items():
        write_bytes(target.parent / name, files[path])
    write_bytes(target, gzip.compress(content, 9, mtime=0))
    log.info(f"built from its source, sha256 {upstream.sha256[:12]} as expected. {upstream.terms}")
    return target


def _already_there(upstream: Upstream) -> Path | None:
    for path in (shipped_dir("data") / upstream.name, prepared_dir() / upstream.name):
        if path.is_file():
            found = _content_hash(path)
            if found == upstream.sha256:
                log.info(f"already there, sha256 {found[:12]} as expected; --out FILE builds it again")
                return path
            raise InputError(
                f"{path} has sha256 {found[:12]}, not {upstream.sha256[:12]}"
                if found
                else f"{path} cannot be unpacked",
                why="it was changed or damaged",
                fix="remove it and prepare again",
            )
    return None


def _content_hash(path: Path) -> str | None:
    """SHA-256 of a gzip file's contents; None if it cannot be unpacked."""
    try:
        return hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return None
