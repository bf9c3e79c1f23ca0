"""A thing that is wrong with one key, and how several of them become one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.config.keys import KeyPath, dotted, suggest
from finetune.config.layers import Layer, place_of
from finetune.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One key that cannot be used as given.

    Attributes:
        path: the key.
        what: continues a sentence that starts with the key, such as `is 0, must be at least 1`.
        fix: what to write instead, if that is known.
    """

    path: KeyPath
    what: str
    fix: str | None = None


def unknown_key(path: KeyPath) -> Problem:
    """Describe a key that the schema does not have, with the nearest one that it does have."""
    return Problem(path, "is not a key", suggest(path))


def raise_problems(problems: Sequence[Problem], layers: Sequence[Layer]) -> None:
    """Raise one error that names every problem with the place that set the key; none if there is none.

    Args:
        problems: what is wrong.
        layers: the places that set keys, in the order in which they apply.

    Raises:
        ConfigError: there is a problem.
    """
    if not problems:
        return
    lines = [f"{place_of(problem.path, layers)}: {dotted(problem.path)} {problem.what}" for problem in problems]
    if len(problems) == 1:
        raise ConfigError(lines[0], fix=problems[0].fix)
    with_fixes = [
        line + (f" ({problem.fix})" if problem.fix else "") for line, problem in zip(lines, problems, strict=True)
    ]
    raise ConfigError(f"{len(problems)} keys cannot be used as given\n  " + "\n  ".join(with_fixes))
