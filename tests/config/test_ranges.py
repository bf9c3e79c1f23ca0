"""Ranges beside the fields: each is checked, described in words, and part of the JSON schema."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from annotated_types import Ge, Gt, Le, Lt

from finetune.config.compose import compose
from finetune.config.fields import describe_range
from finetune.config.json_schema import recipe_schema
from finetune.config.schema_paths import KeyPath, all_paths, dotted, range_at, section_classes, type_at
from finetune.errors import ConfigError

NUMBERS = {int, float, int | None, float | None}
# Numbers whose range depends on other keys.
FREE = {"adapter.router.rank", "adapter.experts.dropout"}
LIKE = ("data", "train", "cuad")


def numbers() -> list[KeyPath]:
    paths = [path for path in all_paths(like=LIKE) if type_at(path) in NUMBERS]
    return [path for path in paths if "NAME" not in path and dotted(path) not in FREE]


def kind_with(path: KeyPath) -> list[str]:
    """The override that chooses a kind of objective with this key."""
    if path[0] != "objective":
        return []
    classes = section_classes(type_at(("objective",)))
    return [f"objective={next(each.kind for each in classes if hasattr(each, path[1]))}"]


def test_the_walk_finds_numbers() -> None:
    assert len(numbers()) > 40 and ("data", "train", "cuad", "limit") in numbers()


@pytest.mark.parametrize("path", numbers(), ids=dotted)
def test_every_number_has_a_range_that_refuses_what_is_below_it(path: KeyPath) -> None:
    words = range_at(path)
    assert words is not None
    with pytest.raises(ConfigError) as caught:
        compose("quickstart", [*kind_with(path), f"{dotted(path)}=-1"])
    assert f"{dotted(path)} is -1, must be {words}" in str(caught.value)
    content: dict[str, Any] = {"objective": {"kind": kind_with(path)[0].partition("=")[2]}} if kind_with(path) else {}
    section = content
    for key in path[:-1]:
        section = section.setdefault(key, {})
    validator = jsonschema.Draft202012Validator(recipe_schema())
    section[path[-1]] = -1
    assert list(validator.iter_errors(content))


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ([Ge(0)], "0 or more"),
        ([Ge(1)], "at least 1"),
        ([Gt(0)], "above 0"),
        ([Ge(0), Le(1)], "between 0 and 1"),
        ([Ge(0), Lt(1)], "0 or more and below 1"),
        ([Gt(0), Le(1)], "above 0 and at most 1"),
    ],
)
def test_ranges_in_words(bounds: list[Any], words: str) -> None:
    assert describe_range(bounds) == words
