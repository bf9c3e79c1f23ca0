"""Tokens kept on disk: used again as long as nothing that they depend on has changed by a byte."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune import log
from finetune.config.paths import HUB_PREFIX, cache_dir
from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.build import Facts, build
from finetune.data.example_table import RECORDS_FILE, SAMPLES_FILE, Tables, TableWriter, open_tables
from finetune.data.files import broken_file, find_files
from finetune.data.harmony.tokenizer import RANK_FILE_SHA256
from finetune.data.sources import BadRecord, SplitName, counts_broken_records, sources_of
from finetune.errors import InputError, MachineError
from finetune.files import sha256_of, staged_directory

FACTS_FILE = "facts.json"

# Settings that change which rows are used or refused after tokenising, and where things are kept, but no token.
_NOT_IN_KEY = {
    "train", "validation", "test", "on_bad_record", "max_skipped_ratio", "pack", "cache", "cache_dir",
    "mix_temperature",
}  # fmt: skip

_NO_CACHE = "set data.cache_dir to a directory with room, or data.cache=false to hold the tokens in memory"


def cached(config: DataConfig, split: SplitName) -> tuple[Tables, Facts]:
    """A split's tokens from the cache, built first if they are not in it.

    Of processes that start together one builds and the others wait for it (a lock that ends with the process, so a kill
    leaves nothing behind). Files are compared with their sha256 before they are used; damaged ones are built anew.

    Args:
        config: what the tokens depend on, and where the cache is.
        split: which of the recipe's splits.

    Raises:
        ConfigError, InputError: see `build`.
        MachineError: the cache cannot be written.
    """
    key = cache_key(config, split)
    name = f"{split}-{_sha256_of(key)[:24]}"
    root = cache_dir(config.cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds the text of the training data
        with _lock(root / f"{name}.lock"):
            directory = root / name
            facts = _read_facts(directory)
            if facts is not None:
                return open_tables(directory), facts
            return _build_into(directory, key, config, split)
    except OSError as error:
        raise MachineError(
            f"the cache in {root} cannot be written",
            why=str(error),
            fix=_NO_CACHE,
        ) from error


def cache_key(config: DataConfig, split: SplitName) -> dict[str, Any]:
    """Everything that a split's tokens depend on: contents of sources, settings, code and vocabulary."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IN_KEY}
    sources = [  # a list, since their order is the samples'
        {"name": name, "content": _content(name, source), "counts_broken": counts_broken_records(config, split, name)}
        | dataclasses.asdict(dataclasses.replace(source, weight=1.0))
        for name, source in sources_of(config, split).items()
    ]
    return {
        "split": split,
        "settings": settings,
        "sources": sources,
        "code": _code(),
        "openai_harmony": version("openai-harmony"),
        "vocabulary": RANK_FILE_SHA256,
    }


def _build_into(directory: Path, key: Mapping[str, Any], config: DataConfig, split: SplitName) -> tuple[Tables, Facts]:
    """Build beside the final place and rename, so that what has the final name is whole."""
    if directory.exists():
        shutil.rmtree(directory)
    with staged_directory(directory, "the cached tokens", fix=_NO_CACHE, mode=0o700) as unfinished:
        writer = TableWriter(unfinished)
        try:
            facts = build(config, split, writer)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        if cache_key(config, split)["sources"] != key["sources"]:
            raise InputError(
                f"data.{split}: a source changed while it was read",
                fix="start again when nothing writes to it any more",
            )
        document = dataclasses.asdict(facts)
        hashes = {name: sha256_of(unfinished / name) for name in (SAMPLES_FILE, RECORDS_FILE)}
        hashes[FACTS_FILE] = _sha256_of(document)
        (unfinished / FACTS_FILE).write_text(json.dumps({"facts": document, "sha256": hashes, "key": key}))
    return open_tables(directory), facts


def _read_facts(directory: Path) -> Facts | None:
    """The facts of a whole entry; None, said aloud, if it is damaged; None if there is none."""
    if not directory.exists():
        return None
    try:
        document = json.loads((directory / FACTS_FILE).read_text())
        for name in (SAMPLES_FILE, RECORDS_FILE):
            if sha256_of(directory / name) != document["sha256"][name]:
                raise ValueError(f"{name} is not what was written")
        if _sha256_of(document["facts"]) != document["sha256"][FACTS_FILE]:
            raise ValueError(f"{FACTS_FILE} is not what was written")
        facts = Facts(**document["facts"])
        facts.bad_records = [BadRecord(**row) for row in document["facts"]["bad_records"]]
        facts.dropped = [BadRecord(**row) for row in document["facts"]["dropped"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning(f"the cached tokens in {directory} are damaged ({error}); they are made anew")
        return None
    return facts


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process makes the same tokens; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _content(name: str, source: SourceConfig) -> str:
    """What a source holds: sha256 over its files, or the commit of a hub data set."""
    if source.path.startswith(HUB_PREFIX):
        return _hub_commit(name, source)
    digest = hashlib.sha256()
    with broken_file(f"source `{name}`: {source.path}", lambda: "its beginning"):
        for found in find_files(name, source.path):
            files = sorted(file for file in found.rglob("*") if file.is_file()) if found.is_dir() else [found]
            for file in files:
                digest.update(file.name.encode("utf-8", "surrogateescape") + f"\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _hub_commit(name: str, source: SourceConfig) -> str:
    if source.revision is not None and len(source.revision) == 40:
        return source.revision
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(source.path.removeprefix(HUB_PREFIX), revision=source.revision).sha
    except Exception as error:  # http, offline and not-found errors have no common class
        raise MachineError(
            f"source `{name}`: the hub does not say which commit {source.path} is at",
            why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            fix="set the source's revision to a commit, or data.cache=false",
        ) from None
    return str(found)


def _code() -> str:
    """sha256 over this package's source: tokens made by other code are other tokens."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sha256_of(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
