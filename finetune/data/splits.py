"""Which sources and which of their records make a split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

from finetune.config.schema import DataConfig, SourceConfig
from finetune.errors import ConfigError

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


def split_names(config: DataConfig) -> tuple[SplitName, ...]:
    """The splits that a recipe has."""
    return tuple(split for split in SPLITS if _sources(config, split))


def sources_of(config: DataConfig, split: SplitName) -> Mapping[str, SourceConfig]:
    """The sources that a split reads; with `validation_split`, validation reads the training sources.

    Raises:
        ConfigError: the recipe has none.
    """
    sources = _sources(config, split)
    if not sources:
        raise ConfigError(f"data.{split} names no source", fix=f"set data.{split}.NAME.path in the recipe")
    return sources


def counts_broken_rows(config: DataConfig, split: SplitName, name: str) -> bool:
    """Whether a source counts the rows that are no records, which belong to no value of `where` or `validation_split`.

    The first source that reads the file to its end does, in the order train, validation, test, so that each such row
    is counted once.
    """
    source = sources_of(config, split)[name]
    for earlier in SPLITS:
        for other_name, other in _sources(config, earlier).items():
            if (earlier, other_name) == (split, name):
                return True
            if (other.path, other.split, other.limit) == (source.path, source.split, None):
                return False
    return True


def belongs_to(fields: Mapping[str, str], config: DataConfig, split: SplitName) -> bool:
    """Whether a record of one of the split's sources is in the split.

    `validation_split` decides by a hash of the field's value alone: no seed, so that a record stays where it is when
    others are added, and records that share the value are never on both sides. A record without the field is trained.
    """
    key = config.validation_split.key
    if key is None or split == "test":
        return True
    held_out = key in fields and share_of(fields[key]) < config.validation_split.share
    return held_out == (split == "validation")


def share_of(value: str) -> float:
    """A number from 0 to 1, evenly spread over values and always the same for the same value."""
    return int.from_bytes(hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _sources(config: DataConfig, split: SplitName) -> Mapping[str, SourceConfig]:
    if split == "validation" and config.validation_split.key is not None:
        return config.train
    sources: Mapping[str, SourceConfig] = getattr(config, split)
    return sources
