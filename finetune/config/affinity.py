"""What `finetune experts score` measured, and what a run made of it: the file of `select`, `rank_by`, experts.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from finetune.config.expert_rules import refuse_missing
from finetune.errors import InputError

Score = Literal["gate", "tokens"]
SCORES: tuple[Score, ...] = get_args(Score)
FORMAT = 1


@dataclass(frozen=True)
class Affinity:
    """How much a data set uses each expert of a base, which experts were chosen for it, and with which ranks.

    Attributes:
        base_name, base_identity: the base that was measured.
        samples, tokens: what it was measured on.
        gate, tokens_share: the two scores, [layers][E].
        by: the score that the choice went by.
        select: the rule of the choice, such as `top_p=0.2`.
        selected: layer -> experts, in order.
        ranks: layer -> rank of each of these experts, 0 for none; None: not decided here, or one rank for all.
    """

    base_name: str
    base_identity: str
    samples: int
    tokens: int
    gate: list[list[float]]
    tokens_share: list[list[float]]
    by: Score
    select: str
    selected: dict[int, tuple[int, ...]]
    ranks: dict[int, tuple[int, ...]] | None = None

    def scores(self, by: Score) -> list[list[float]]:
        """One of the two scores, [layers][E]."""
        return self.gate if by == "gate" else self.tokens_share

    def describe(self) -> list[str]:
        """One line for each layer: how many experts were chosen, how much of both scores they have, and their ranks."""
        lines = []
        for layer, experts in self.selected.items():
            gate, share = (sum(scores[layer][e] for e in experts) for scores in (self.gate, self.tokens_share))
            shown = " ".join(map(str, experts[:12])) + (" ..." if len(experts) > 12 else "")
            lines.append(
                f"layer {layer:>2}: {len(experts):>3} of {len(self.gate[layer])} experts, {gate:.1%} of the gate, "
                f"{share:.1%} of the choices: {shown}{self._ranks_of(layer)}"
            )
        total = sum(map(len, self.selected.values()))
        whole = sum(map(len, self.gate))
        lines.append(f"{total} of {whole} experts by {self.by} with {self.select}, on {self.samples} samples")
        return lines

    def _ranks_of(self, layer: int) -> str:
        if self.ranks is None:
            return ""
        ranks = self.ranks[layer]
        with_one = [rank for rank in ranks if rank]
        left = f", {len(ranks) - len(with_one)} with none" if len(with_one) < len(ranks) else ""
        return f"; ranks {min(with_one)} to {max(with_one)}, {sum(ranks)} together{left}"


def write_affinity(path: Path, affinity: Affinity) -> None:
    """Write the JSON that `adapter.experts.select` and `.rank_by` take."""
    content = {"format": FORMAT} | asdict(affinity)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_affinity(path: Path, key: str = "select") -> Affinity:
    """Read what `write_affinity` wrote.

    Args:
        path: the file.
        key: of `adapter.experts` that names it, for messages.

    Raises:
        ConfigError: there is no such file.
        InputError: it is something else, or damaged.
    """
    refuse_missing(path, key)
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        content["selected"] = _by_layer(content["selected"])
        if content.get("ranks") is not None:
            content["ranks"] = _by_layer(content["ranks"])
        affinity = Affinity(**content)
        _check(affinity)
        return affinity
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path} is not a file that `finetune experts score` wrote", why=f"{type(error).__name__}: {error}"
        ) from error


def _by_layer(content: dict[str, list[int]]) -> dict[int, tuple[int, ...]]:
    return {int(layer): tuple(map(int, values)) for layer, values in content.items()}


def _check(affinity: Affinity) -> None:
    """Raise ValueError or TypeError if numbers that ranks are made of are none, or do not belong together."""
    for scores in (affinity.gate, affinity.tokens_share):
        if not all(0 <= value <= 1 for of_layer in scores for value in of_layer):
            raise ValueError("a score is not between 0 and 1")
    if affinity.by not in SCORES:
        raise ValueError(f"by is {affinity.by!r}")
    if affinity.ranks is None:
        return
    lengths = [{layer: len(of) for layer, of in table.items()} for table in (affinity.ranks, affinity.selected)]
    if lengths[0] != lengths[1] or any(rank < 0 for ranks in affinity.ranks.values() for rank in ranks):
        raise ValueError("its ranks are not one for each selected expert")
