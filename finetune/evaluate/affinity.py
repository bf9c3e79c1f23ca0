"""Which experts a data set uses, and the choice of those worth adapting (ESFT: Wang et al. 2024, arXiv:2407.01906).

Two scores for each expert of a layer, both means over samples of means over a sample's tokens, both adding up to 1
over a layer: the weight with which its router takes the expert (`gate`), and how often it does, as a share of all
choices (`tokens`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.sites import refuse_bad_selection
from finetune.config.expert_rules import SelectRule, parse_select, refuse_missing
from finetune.config.schema import AdapterConfig, DataConfig
from finetune.console import say
from finetune.data.render import Sample
from finetune.errors import ConfigError, InputError
from finetune.evaluate.routing import count_routing, spread
from finetune.model.build import Base

Score = Literal["gate", "tokens"]
SCORES: tuple[Score, ...] = get_args(Score)
SCORED_SAMPLES = 128
FORMAT = 1


@dataclass(frozen=True)
class Affinity:
    """How much a data set uses each expert of a base, and which experts were chosen for it.

    Attributes:
        base_name, base_identity: the base that was measured.
        samples, tokens: what it was measured on.
        gate, tokens_share: the two scores, [layers][E].
        by: the score that the choice went by.
        select: the rule of the choice, such as `top_p=0.2`.
        selected: layer -> experts, in order.
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

    def describe(self) -> list[str]:
        """One line for each layer: how many experts were chosen, and how much of both scores they have."""
        lines = []
        for layer, experts in self.selected.items():
            gate, share = (sum(scores[layer][e] for e in experts) for scores in (self.gate, self.tokens_share))
            shown = " ".join(map(str, experts[:12])) + (" ..." if len(experts) > 12 else "")
            lines.append(
                f"layer {layer:>2}: {len(experts):>3} of {len(self.gate[layer])} experts, {gate:.1%} of the gate, "
                f"{share:.1%} of the choices: {shown}"
            )
        total = sum(map(len, self.selected.values()))
        whole = sum(map(len, self.gate))
        lines.append(f"{total} of {whole} experts by {self.by} with {self.select}, on {self.samples} samples")
        return lines


def score_experts(
    base: Base, base_name: str, samples: Sequence[Sample], data: DataConfig, select: str, by: Score, count: int
) -> Affinity:
    """Measure both scores with the model as it is, and choose.

    Args:
        base: without an adapter, or with it off.
        base_name: for the file.
        samples: training samples; up to `count` of them, evenly spread, are used.
        data: gives the length of a row.
        select: `top_p=...` or `top_k=...`.
        by: the score to choose by.
        count: samples at most.

    Raises:
        ConfigError: the rule asks for more experts than there are.
    """
    rule = parse_select(select)
    refuse_too_many(rule, base.checkpoint.shape.num_experts)
    used = spread(samples, count)
    counts = count_routing(
        base,
        used,
        data.max_length,
        lambda number: np.full(len(used[number].ids), number, dtype=np.int64),
        len(used),
        task="scoring experts",
    )
    per_sample = counts.tokens[:, None, None]
    gate = (counts.gates / per_sample).mean(0)
    share = (counts.chosen / per_sample).mean(0) / base.checkpoint.shape.num_active_experts
    scores = gate if by == "gate" else share
    selected = choose(scores, rule)
    return Affinity(
        base_name,
        base.identity,
        len(used),
        int(counts.tokens.sum()),
        gate.tolist(),
        share.tolist(),
        by,
        select,
        selected,
    )


def refuse_too_many(rule: SelectRule, num_experts: int) -> None:
    """Raise ConfigError if `top_k` asks for more experts than a layer has."""
    if rule.top_k > num_experts:
        raise ConfigError(
            f"adapter.experts.select asks for {rule.top_k} experts a layer, the base has {num_experts}",
            fix=f"write top_k={num_experts} or less, or `all`",
        )


def choose(scores: NDArray[np.float64], rule: SelectRule) -> dict[int, tuple[int, ...]]:
    """The experts of each layer with the highest scores; of equal ones the first.

    Args:
        scores: [layers, E], each layer's adding up to 1.
        rule: `top_k`: so many, at most E; `top_p`: the fewest that have that share together.
    """
    selected = {}
    for layer, row in enumerate(scores):
        order = np.argsort(-row, kind="stable")
        enough = np.cumsum(row[order]) >= rule.top_p * row.sum() - 1e-9
        count = rule.top_k or int(enough.argmax()) + 1
        selected[layer] = tuple(sorted(int(expert) for expert in order[:count]))
    return selected


def write_affinity(path: Path, affinity: Affinity) -> None:
    """Write the JSON that `adapter.experts.select` takes."""
    content = {"format": FORMAT} | asdict(affinity)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_affinity(path: Path) -> Affinity:
    """Read what `write_affinity` wrote.

    Raises:
        ConfigError: there is no such file.
        InputError: it is something else, or damaged.
    """
    refuse_missing(path)
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        content["selected"] = {int(layer): tuple(map(int, e)) for layer, e in content["selected"].items()}
        return Affinity(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a file that `finetune experts score` wrote", why=f"{type(error).__name__}: {error}"
        ) from error


def check_selection(affinity: Affinity, base: Base, config: AdapterConfig, where: str) -> None:
    """Compare a choice with the base and the recipe it is to be used with.

    Raises:
        ConfigError: it was measured on another base, or leaves a layer without experts, or names one that is not there.
    """
    if affinity.base_identity != base.identity:
        raise ConfigError(
            f"adapter.experts.select: {where} was measured on another base",
            why=f"it belongs to {affinity.base_name} ({affinity.base_identity[:12]}), this is {base.identity[:12]}",
            fix="measure again: finetune experts score RECIPE --out FILE",
        )
    refuse_bad_selection(affinity.selected, base.checkpoint.shape, config, where)


def choose_experts(
    base: Base, base_name: str, samples: Sequence[Sample], data: DataConfig, config: AdapterConfig
) -> Affinity | None:
    """What `adapter.experts.select` comes to for a base and its training samples; None for all experts.

    Raises:
        ConfigError: see `check_selection`.
    """
    rule = parse_select(config.experts.select)
    if rule.kind == "all":
        return None
    if rule.kind == "file":
        affinity = read_affinity(Path(rule.path).expanduser())
        check_selection(affinity, base, config, rule.path)
    else:
        affinity = score_experts(base, base_name, samples, data, config.experts.select, "gate", SCORED_SAMPLES)
    say("experts to adapt:\n  " + "\n  ".join(affinity.describe()))
    return affinity
