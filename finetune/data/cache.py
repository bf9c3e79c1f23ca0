"""Tokens kept on disk: reused as long as nothing that they depend on has changed by a byte."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from finetune import log
from finetune.config.paths import HUB_PREFIX, cache_dir
from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.control_text import ControlText
from finetune.data.example_table import EXAMPLES_FILE, RECORDS_FILE, Tables, TableWriter, open_tables
from finetune.data.files import broken_file, find_files
from finetune.data.harmony.tokenizer import RANK_FILE_SHA256
from finetune.data.sources import BadRecord, SplitName, counts_broken_records, sources_of
from finetune.errors import InputError, MachineError
from finetune.files import JsonObject, sha256_of, staged_directory
from finetune.records import parse_record

STATS_FILE = "stats.json"

# Settings that change which records are used or refused after tokenising, or where files are kept, but no token.
_NOT_IN_KEY = {
    "train", "validation", "test", "on_bad_record", "max_skipped_ratio", "pack", "cache", "cache_dir",
    "mix_temperature",
}  # fmt: skip

_NO_CACHE = "set data.cache_dir to a directory with room, or data.cache=false to keep the tokens in memory"


MOST_ANSWERS = 1000
"""Different answers counted per source: far more than a label set has, far fewer than a large source may have."""


@dataclass
class SplitStats:
    """Counts of one pass over a split's sources.

    Attributes:
        source_sizes: examples of each source, in order; a source's examples are contiguous.
        forms: how many records came in which form.
        unused_keys: key that nothing is read from -> how many of these records have it.
        num_records: records that gave at least one example.
        num_tokens, num_trained_tokens: of all examples; trained tokens have a loss weight above 0.
        num_truncated: examples that lost context to fit.
        bad_records: records that cannot be used, each with its reason.
        dropped: records left out because the recipe says so, such as too long ones, each with its reason.
        answers: per source, how many records have which `answer`; only the first `MOST_ANSWERS` different ones.
        control_text: kind -> records whose texts another template or channel would read as control.
        num_moved_thinking: records whose thinking was moved out of tags (`data.think_tags`).
        labels: how many answers without others to the same prompt are desirable and undesirable.
        fingerprint: SHA-256 over the examples' token ids and weights, in order: identifies what is trained, whatever
            its source.
    """

    source_sizes: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    unused_keys: dict[str, int] = field(default_factory=dict)
    num_records: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_truncated: int = 0
    bad_records: list[BadRecord] = field(default_factory=list)
    dropped: list[BadRecord] = field(default_factory=list)
    answers: dict[str, dict[str, int]] = field(default_factory=dict)
    control_text: dict[str, ControlText] = field(default_factory=dict)
    num_moved_thinking: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""

    @classmethod
    def from_json(cls, document: JsonObject) -> SplitStats:
        """Read the output of `dataclasses.asdict`.

        Raises:
            InputError: a key is missing, or has a value of another type.
        """
        return parse_record(cls, document, STATS_FILE)


class CacheEntry:
    """The tokens of one split in the cache, locked for this process.

    Args:
        root: directory of the cache.
        config: what the tokens depend on.
        split: which of the recipe's splits.
    """

    def __init__(self, root: Path, config: DataConfig, split: SplitName) -> None:
        self._config, self._split = config, split
        self._key = cache_key(config, split)
        self.directory = root / f"{split}-{_sha256_of(self._key)[:24]}"
        self._staging = self.directory

    def read(self) -> tuple[Tables, SplitStats] | None:
        """Open a whole entry: its tables and statistics. None if there is none, or (with a warning) if it is damaged.

        Files are compared with their SHA-256 before they are used.
        """
        if not self.directory.exists():
            return None
        try:
            document = json.loads((self.directory / STATS_FILE).read_text())
            for name in (EXAMPLES_FILE, RECORDS_FILE):
                if sha256_of(self.directory / name) != document["sha256"][name]:
                    raise ValueError(f"the contents of {name} have changed")
            if _sha256_of(document["stats"]) != document["sha256"][STATS_FILE]:
                raise ValueError(f"the contents of {STATS_FILE} have changed")
            stats = SplitStats.from_json(document["stats"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError) as error:
            log.warning(f"the cached tokens in {self.directory} are damaged ({error}); they are made again")
            return None
        return self.open(), stats

    def open(self) -> Tables:
        """Map the tables of a whole entry into memory."""
        return open_tables(self.directory)

    @contextmanager
    def writer(self) -> Iterator[TableWriter]:
        """Write the entry beside its final place; leaving without an error after `complete` renames it."""
        if self.directory.exists():
            shutil.rmtree(self.directory)
        with staged_directory(self.directory, "the cached tokens", fix=_NO_CACHE, mode=0o700) as self._staging:
            writer = TableWriter(self._staging)
            try:
                yield writer
            finally:
                writer.abandon()

    def complete(self, writer: TableWriter, stats: SplitStats) -> None:
        """Close the tables and store the statistics and all hashes.

        Raises:
            InputError: a source changed while it was read.
        """
        writer.close()
        if cache_key(self._config, self._split)["sources"] != self._key["sources"]:
            raise InputError(
                f"data.{self._split}: a source changed while it was read",
                fix="start again when nothing writes to it any more",
            )
        hashes = {name: sha256_of(self._staging / name) for name in (EXAMPLES_FILE, RECORDS_FILE)}
        counts = dataclasses.asdict(stats)
        document = {"stats": counts, "sha256": hashes | {STATS_FILE: _sha256_of(counts)}, "key": self._key}
        (self._staging / STATS_FILE).write_text(json.dumps(document))


@contextmanager
def locked_entry(config: DataConfig, split: SplitName) -> Iterator[CacheEntry]:
    """Open a split's place in the cache while no other process uses it.

    Of processes that start together one builds and the others wait for it. The lock ends with its process, so a killed
    one leaves nothing behind.

    Raises:
        MachineError: the cache cannot be written.
    """
    root = cache_dir(config.cache_dir)
    entry = CacheEntry(root, config, split)
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds the text of the training data
        with entry.directory.with_suffix(".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process makes the same tokens; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield entry
    except OSError as error:
        raise MachineError(
            f"the cache in {root} cannot be written",
            why=str(error),
            fix=_NO_CACHE,
        ) from error


def cache_key(config: DataConfig, split: SplitName) -> JsonObject:
    """Everything that a split's tokens depend on: contents of sources, settings, code and vocabulary."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IN_KEY}
    sources = [  # a list, since their order is the examples'
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


def _content(name: str, source: SourceConfig) -> str:
    """Identity of a source's contents: SHA-256 over its files, or the commit of a hub data set."""
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
            f"source `{name}`: the hub does not tell the commit of {source.path}",
            why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            fix="set the source's revision to a commit, or data.cache=false",
        ) from None
    return str(found)


def _code() -> str:
    """SHA-256 over this package's source: other code may make other tokens."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sha256_of(document: JsonObject) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
