"""pytest plugin of `instruction_sets.py`: margin of each numerical assertion that passed.

    pytest -p assertion_margins -o enable_assertion_pass_hook=true     # with ASSERTION_MARGINS=FILE

One JSON line for each assertion of one of the forms `a < b`, `a <= b`, `a > b`, `a == b ± c`. `share` is 0 far from
the limit and 1 on it.
"""

from __future__ import annotations

import json
import os
import re

import pytest

NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
VALUE = rf"(?:np\.float(?:32|64)\()?(?:tensor\()?({NUMBER})(?:, (?:dtype|grad_fn|device)=[^()]*)*\)*"
COMPARED = re.compile(rf"^{VALUE} (<=?|>=?) {VALUE}$")
APPROXIMATE = re.compile(rf"^{VALUE} == {VALUE} ± ({NUMBER})$")
LARGEST_LIMIT = 0.5  # beyond it a comparison is of sizes and counts, not of rounding


def measured(explanation: str) -> list[tuple[float, float, float]]:
    """Value, limit and share of each comparison of an assertion that passed."""
    pieces = explanation.partition("\n")[0].split(" and ")
    return [found for piece in pieces if (found := _measured(piece.strip(" ()")))]


def _measured(line: str) -> tuple[float, float, float] | None:
    if match := APPROXIMATE.match(line):
        value, wanted, limit = (float(match[number]) for number in (1, 2, 3))
        return (abs(value - wanted), limit, abs(value - wanted) / limit) if limit else None
    match = COMPARED.match(line)
    if match is None:
        return None
    value, limit = float(match[1]), float(match[3])
    if not (0 < limit < LARGEST_LIMIT and value >= 0):
        return None
    if match[2].startswith("<"):
        return value, limit, value / limit
    return value, limit, limit / value if value else 1.0


@pytest.hookimpl
def pytest_assertion_pass(item: pytest.Item, lineno: int, orig: str, expl: str) -> None:
    """Write the line."""
    with open(os.environ["ASSERTION_MARGINS"], "a") as file:
        for value, limit, share in measured(expl):
            line = {"test": item.nodeid, "line": lineno, "assertion": orig[:200]}
            file.write(json.dumps(line | {"value": value, "limit": limit, "share": share}) + "\n")
