"""Settings that save memory, cheapest first: what each costs in words, and what it saves by estimating again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from finetune.config.rules import broken_rules
from finetune.config.schema import RunConfig
from finetune.config.schema_paths import allowed_words, type_at
from finetune.estimate.fit import Budget, fit
from finetune.estimate.shapes import BaseShape

Overrides = dict[str, Any]
"""Values by dotted key, as they follow each other on the command line."""
WORTH_SHARE = 0.02  # of what is missing, or else of the peak; a change that saves less is not worth a line


@dataclass(frozen=True)
class Change:
    """One change of a recipe.

    Attributes:
        overrides: keys and values.
        costs: what it costs, in words.
        saves_bytes: of the estimated peak, made alone.
        fits: whether it is enough, made alone.
    """

    overrides: Overrides
    costs: str
    saves_bytes: float
    fits: bool


def candidates(config: RunConfig, base: BaseShape) -> Iterator[tuple[Overrides, str]]:
    """Changes in the order of what they cost: first speed, then rounding, then what is learnt and from what.

    Yields:
        Overrides and their cost in words. Some may not be possible for this recipe; `with_overrides` says.
    """
    trainer, model, adapter = config.trainer, config.model, config.adapter
    rows, gradient_accumulation_steps = trainer.micro_batch_size, trainer.gradient_accumulation_steps
    while rows > 1 and rows % 2 == 0:
        rows, gradient_accumulation_steps = rows // 2, gradient_accumulation_steps * 2
        fewer = {"trainer.micro_batch_size": rows, "trainer.gradient_accumulation_steps": gradient_accumulation_steps}
        yield fewer, "the same step in smaller pieces, a little slower"
    yield {"model.embedding_on_cpu": True}, "a copy of the tokens' rows each micro-step"
    for chunk in (16, 8, 4):
        if chunk < min(model.experts_per_chunk, base.num_experts):
            yield {"model.experts_per_chunk": chunk}, "more and smaller launches"
    yield {"trainer.activation_checkpointing": True}, "layers are computed twice, about 40 % more arithmetic"
    yield {"trainer.activation_offload": True}, "traffic between GPU and host beside the computation"
    yield {"trainer.optimizer": "adamw_8bit"}, "moments rounded to 8 bits"
    yield {"trainer.optimizer_states_on_cpu": True}, "moments cross the bus once a step"
    yield {"adapter.dtype": "bfloat16"}, "parameters rounded, at random so that small updates count"
    narrow = {"adapter.dtype": "bfloat16", "trainer.gradient_dtype": "bfloat16"}
    yield narrow, "parameters and the sums of gradients rounded"
    yield {"model.attention_storage": "nf4"}, "attention weights rounded: another base than the published one"
    for rank in (16, 8, 4, 2):
        if rank < adapter.experts.rank:
            alpha = adapter.experts.alpha * rank / adapter.experts.rank
            lower = {"adapter.experts.rank": rank, "adapter.experts.alpha": alpha}
            yield lower, "less capacity in each expert"
    if config.data.max_length > 1024:
        yield {"data.max_length": config.data.max_length // 2}, "longer samples no longer fit a row (data.too_long)"
    layers = adapter.layers or (0, base.num_layers - 1)
    if layers[1] > layers[0]:
        yield {"adapter.layers": ((layers[0] + layers[1] + 1) // 2, layers[1])}, "only the upper layers are trained"


def with_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig | None:
    """The recipe with some keys set; None where the schema or its rules do not allow that, or nothing would change."""
    changed = config
    for key, value in overrides.items():
        path = tuple(key.split("."))
        kind = type_at(path)
        words = allowed_words(kind) if kind is not None else ()
        if kind is None or (words and value not in words):
            return None
        changed = _set(changed, path, value)
    if changed == config or len(list(broken_rules(changed))) > len(list(broken_rules(config))):
        return None
    return changed


def cheapest_changes(config: RunConfig, base: BaseShape, budget: Budget, limit: int = 3) -> list[Change]:
    """The first few changes that are worth naming, each estimated alone.

    Args:
        config: a recipe that does not fit, by the estimate or in fact.
        base: its base's sizes.
        budget: what it should fit into.
        limit: how many.
    """
    now = fit(config, base, budget)
    worth = WORTH_SHARE * (now.over_bytes if not now.fits else now.memory.total_bytes)
    found: list[Change] = []
    for overrides, costs in candidates(config, base):
        changed = with_overrides(config, overrides)
        if changed is None or any(overrides.keys() == other.overrides.keys() for other in found):
            continue
        then = fit(changed, base, budget)
        saves = now.over_bytes - then.over_bytes
        if saves > worth:
            found.append(Change(overrides, costs, saves, then.fits))
        if len(found) == limit:
            break
    return found


def changes_that_fit(config: RunConfig, base: BaseShape, budget: Budget) -> Overrides | None:
    """A set of changes after which the recipe fits: cheap ones first, none that is not needed.

    Returns:
        None if all known changes together are not enough; {} if none is needed.
    """
    chosen: list[Overrides] = []
    changed = config
    for overrides, _ in candidates(config, base):
        if fit(changed, base, budget).fits:
            break
        further = with_overrides(changed, overrides)
        if further is not None:
            changed = further
            chosen.append(overrides)
    if not fit(changed, base, budget).fits:
        return None
    for overrides in reversed(chosen[:]):
        without = _joined([other for other in chosen if other is not overrides])
        trial = with_overrides(config, without) if without else config
        if trial is not None and fit(trial, base, budget).fits:
            chosen.remove(overrides)
    return _joined(chosen)


def as_text(overrides: Mapping[str, Any]) -> str:
    """Overrides as they are pasted behind a command.

    >>> as_text({"trainer.gradient_accumulation_steps": 8, "model.embedding_on_cpu": True, "adapter.layers": (12, 23)})
    'trainer.gradient_accumulation_steps=8 model.embedding_on_cpu=true adapter.layers=[12,23]'
    """
    return " ".join(f"{key}={_value_text(value)}" for key, value in overrides.items())


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _joined(chosen: list[Overrides]) -> Overrides:
    """Later ones win: two chunk sizes become the smaller."""
    return {key: value for overrides in chosen for key, value in overrides.items()}


def _set(section: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of nested frozen dataclasses with one field set."""
    assert any(field.name == path[0] for field in fields(section))
    inner = value if len(path) == 1 else _set(getattr(section, path[0]), path[1:], value)
    return replace(section, **{path[0]: inner})
