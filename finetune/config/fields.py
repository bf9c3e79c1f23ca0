"""Shared by the schema's modules: plain data, the base class of sections, and ranges in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt

Plain = dict[str, Any]
"""Configuration as nested dicts, lists and scalars: what YAML and JSON files contain."""

BOUNDS = (Ge, Gt, Le, Lt)


class Strict:
    """Base of the schema's sections: an unknown key is an error, and no number may be nan or infinite."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}


def describe_range(bounds: Sequence[Any]) -> str:
    """Write the bounds of an annotated number in words.

    >>> describe_range([Ge(0), Lt(1)])
    '0 or more and below 1'
    """
    match bounds:
        case [Ge(ge=low), Le(le=high)]:
            return f"between {low} and {high}"
        case _:
            return " and ".join(map(_describe_bound, bounds))


def _describe_bound(bound: Any) -> str:
    match bound:
        case Ge(ge=0):
            return "0 or more"
        case Ge(ge=low):
            return f"at least {low}"
        case Gt(gt=low):
            return f"above {low}"
        case Le(le=high):
            return f"at most {high}"
        case Lt(lt=high):
            return f"below {high}"
    raise TypeError(f"{bound!r} is no bound of a number")
