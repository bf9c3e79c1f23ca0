"""Differences between two configurations, or between one and the schema's defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.config.fields import Plain
from finetune.config.schema import RunConfig, SourceConfig
from finetune.config.schema_paths import children, section_classes, section_tags

ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """A key whose value differs.

    Attributes:
        key: dotted.
        before, after: plain values; `ABSENT` where a mapping with free names has no such entry.
    """

    key: str
    before: Any
    after: Any

    def describe(self) -> str:
        """Describe the difference in a line.

        >>> Difference("trainer.epochs", 1.0, 2).describe()
        'trainer.epochs: 1.0 -> 2'
        """
        return f"{self.key}: {as_typed(self.before)} -> {as_typed(self.after)}"


def as_typed(value: Any) -> str:
    """Write a value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differences(before: Plain, after: Plain) -> list[Difference]:
    """Compare two plain configurations key by key, in `after`'s order, then what only `before` has.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    [Difference(key='a.c', before=2, after=3)]
    """
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        Difference(key, old.get(key, ABSENT), new.get(key, ABSENT))
        for key in [*new, *(key for key in old if key not in new)]
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    ]


def defaults(like: Plain) -> Plain:
    """Write the schema's defaults as plain data; keys without a default are left out.

    Args:
        like: a whole plain configuration; its objective and the names of its sources are taken over, with the
            defaults of that kind and of a source.
    """
    plain = _defaults_of(RunConfig)
    objective = _class_of(children(RunConfig)["objective"], like.get("objective", {}).get("kind"))
    default_kind = _defaults_of(RunConfig)["objective"]["kind"]
    plain["objective"] = _defaults_of(objective) | {"kind": default_kind}
    plain["trainer"]["learning_rate"] = objective.default_learning_rate
    for split in ("train", "validation", "test"):
        plain["data"][split] = {name: _defaults_of(SourceConfig) for name in like["data"][split]}
    return plain


def _defaults_of(kind: Any) -> Plain:
    plain: Plain = {}
    for field in dataclasses.fields(kind):
        if sections := section_classes(children(kind)[field.name]):
            plain[field.name] = _defaults_of(sections[0])
        elif field.default is not dataclasses.MISSING:
            plain[field.name] = list(field.default) if isinstance(field.default, tuple) else field.default
        elif field.default_factory is not dataclasses.MISSING:
            plain[field.name] = field.default_factory()
    return plain


def _class_of(kind: Any, tag: str | None) -> Any:
    """Choose the class of a tagged union; the first one without a tag."""
    sections = section_classes(kind)
    return next((section for section in sections if tag in section_tags(section)), sections[0])


def _leaves(plain: Plain, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, dict):  # an empty mapping sets nothing
            yield f"{prefix}{key}", value
