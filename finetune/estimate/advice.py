"""Settings that save memory, cheapest first, and a plan for given GPUs: fit first, then speed with what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from finetune.arch import Arch
from finetune.config.rules import broken_rules
from finetune.config.schema import RunConfig
from finetune.config.schema_paths import allowed_words, type_at
from finetune.estimate.fit import Budget, fit

Overrides = dict[str, Any]
"""Values by dotted key, in the order in which they are written on the command line."""
WORTH_SHARE = 0.02  # of what is missing, or else of the peak; a change that saves less is not worth a line
KINDS = ("ddp", "zero1", "zero2", "fsdp2")  # from fastest to smallest
FULL_BATCH_TOKENS = 16_384  # of a micro-batch; beyond it the kernels' model gains little (bench/README.md)


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


@dataclass(frozen=True)
class Plan:
    """Proposed settings.

    Attributes:
        config: the recipe with them.
        overrides: what differs from the recipe; empty: nothing.
        reasons: one line per decision.
    """

    config: RunConfig
    overrides: Overrides
    reasons: tuple[str, ...]


def candidates(config: RunConfig, arch: Arch) -> Iterator[tuple[Overrides, str]]:
    """Changes in the order of what they cost: first speed, then rounding, then capacity and training data.

    Yields:
        Overrides and their cost in words. Some may be invalid for this recipe; `with_overrides` finds out.
    """
    trainer, model, adapter = config.trainer, config.model, config.adapter
    size, accumulation = trainer.micro_batch_size, trainer.gradient_accumulation_steps
    while size > 1 and size % 2 == 0:
        size, accumulation = size // 2, accumulation * 2
        smaller = {"trainer.micro_batch_size": size, "trainer.gradient_accumulation_steps": accumulation}
        yield smaller, "the same step in smaller pieces, a little slower"
    yield {"model.embedding_on_cpu": True}, "a copy of the tokens' embeddings per micro-batch"
    for chunk in (16, 8, 4):
        if chunk < min(model.experts_per_chunk, arch.num_experts):
            yield {"model.experts_per_chunk": chunk}, "more and smaller launches"
    yield {"trainer.activation_checkpointing": True}, "layers are computed twice, about 40 % more arithmetic"
    yield {"trainer.activation_offload": True}, "traffic between GPU and host during the computation"
    yield {"trainer.optimizer": "adamw_8bit"}, "moments rounded to 8 bits"
    yield {"trainer.optimizer_states_on_cpu": True}, "moments cross the bus once per step"
    yield {"adapter.dtype": "bfloat16"}, "parameters rounded, stochastically so that small updates count"
    narrow = {"adapter.dtype": "bfloat16", "trainer.gradient_dtype": "bfloat16"}
    yield narrow, "parameters and accumulated gradients rounded"
    yield {"model.attention_storage": "nf4"}, "attention weights rounded: no longer the published base"
    for rank in (16, 8, 4, 2):
        if rank < adapter.experts.rank:
            alpha = adapter.experts.alpha * rank / adapter.experts.rank
            lower = {"adapter.experts.rank": rank, "adapter.experts.alpha": alpha}
            yield lower, "less capacity in each expert"
    if config.data.max_length > 1024:
        halved = {"data.max_length": config.data.max_length // 2}
        yield halved, "longer examples no longer fit a sequence (data.too_long)"
    layers = adapter.layers or (0, arch.num_layers - 1)
    if layers[1] > layers[0]:
        yield {"adapter.layers": ((layers[0] + layers[1] + 1) // 2, layers[1])}, "only the upper layers are trained"


def with_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig | None:
    """The recipe with some keys set; None where the schema or its rules forbid that, or nothing would change."""
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


def cheapest_changes(config: RunConfig, arch: Arch, budget: Budget, limit: int = 3) -> list[Change]:
    """The first few changes that are worth naming, each estimated alone.

    Args:
        config: a recipe that does not fit, by the estimate or in fact.
        arch: its base's dimensions.
        budget: the memory it should fit into.
        limit: how many.
    """
    now = fit(config, arch, budget)
    worth = WORTH_SHARE * (now.over_bytes if not now.fits else now.memory.total_bytes)
    found: list[Change] = []
    for overrides, costs in candidates(config, arch):
        changed = with_overrides(config, overrides)
        if changed is None or any(overrides.keys() == other.overrides.keys() for other in found):
            continue
        then = fit(changed, arch, budget)
        saves = now.over_bytes - then.over_bytes
        if saves > worth:
            found.append(Change(overrides, costs, saves, then.fits))
        if len(found) == limit:
            break
    return found


def changes_that_fit(config: RunConfig, arch: Arch, budget: Budget) -> Overrides | None:
    """A set of changes with which the recipe fits: cheap ones first, none that is not needed.

    Returns:
        None if all known changes together are not enough; {} if none is needed.
    """
    chosen: list[Overrides] = []
    changed = config
    for overrides, _ in candidates(config, arch):
        if fit(changed, arch, budget).fits:
            break
        further = with_overrides(changed, overrides)
        if further is not None:
            changed = further
            chosen.append(overrides)
    if not fit(changed, arch, budget).fits:
        return None
    for overrides in reversed(chosen[:]):
        without = _joined([other for other in chosen if other is not overrides])
        trial = with_overrides(config, without) if without else config
        if trial is not None and fit(trial, arch, budget).fits:
            chosen.remove(overrides)
    return _joined(chosen)


def make_plan(config: RunConfig, arch: Arch, budget: Budget, gpus: int) -> Plan | None:
    """Propose settings with which a recipe fits and runs well.

    Args:
        config: the recipe; its sequences per optimiser step are kept, as far as they divide.
        arch: its base's dimensions.
        budget: of each GPU.
        gpus: how many.

    Returns:
        None if no known settings make it fit.
    """
    reasons: list[str] = []
    overrides = _distributed(config, arch, budget, gpus, reasons)
    needed = changes_that_fit(_apply(config, overrides), arch, budget)
    if needed is None:
        return None
    reasons += [f"{key}: needed to fit" for key in needed]
    overrides |= needed
    overrides |= _fill(_apply(config, overrides), arch, budget, reasons)
    return Plan(_apply(config, overrides), overrides, tuple(reasons))


def as_text(overrides: Mapping[str, Any]) -> str:
    """Overrides as they are written on a command line.

    >>> as_text({"trainer.save_every": 8, "model.embedding_on_cpu": True, "adapter.layers": (12, 23)})
    'trainer.save_every=8 model.embedding_on_cpu=true adapter.layers=[12,23]'
    """
    return " ".join(f"{key}={_value_text(value)}" for key, value in overrides.items())


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _distributed(config: RunConfig, arch: Arch, budget: Budget, gpus: int, reasons: list[str]) -> Overrides:
    """The fastest kind of training on several GPUs whose share fits, else the smallest."""
    if gpus == 1:
        return {}
    for kind in KINDS:
        overrides: Overrides = {
            "distributed.kind": kind,
            "distributed.num_processes": gpus,
            "trainer.gradient_accumulation_steps": max(1, round(config.trainer.gradient_accumulation_steps / gpus)),
        }
        spread = with_overrides(config, overrides)
        if spread is not None and (fit(spread, arch, budget).fits or kind == KINDS[-1]):
            reasons.append(f"distributed.kind: {kind} is the fastest whose share of the memory fits")
            return overrides
    reasons.append("this version trains on one GPU; the others would be idle")
    return {}


def _fill(config: RunConfig, arch: Arch, budget: Budget, reasons: list[str]) -> Overrides:
    """Larger micro-batches while they fit and are worth it, then no recomputation if that fits too."""
    chosen: Overrides = {}
    size, accumulation = config.trainer.micro_batch_size, config.trainer.gradient_accumulation_steps
    while accumulation % 2 == 0 and 2 * size * config.data.max_length <= FULL_BATCH_TOKENS:
        larger = {"trainer.micro_batch_size": 2 * size, "trainer.gradient_accumulation_steps": accumulation // 2}
        if not _fits(config, chosen | larger, arch, budget):
            break
        size, accumulation = 2 * size, accumulation // 2
        chosen |= larger
    if chosen:
        reasons.append(f"trainer.micro_batch_size: {size * config.data.max_length:,} tokens at once, the same step")
    if config.trainer.activation_checkpointing and not config.trainer.activation_offload:
        kept = {"trainer.activation_checkpointing": False}
        if _fits(config, chosen | kept, arch, budget):
            chosen |= kept
            reasons.append("trainer.activation_checkpointing: everything fits, so nothing need be computed twice")
    return chosen


def _fits(config: RunConfig, overrides: Overrides, arch: Arch, budget: Budget) -> bool:
    changed = with_overrides(config, overrides)
    return changed is not None and fit(changed, arch, budget).fits


def _apply(config: RunConfig, overrides: Overrides) -> RunConfig:
    """The recipe with overrides that are known to be valid."""
    changed = with_overrides(config, overrides) if overrides else config
    assert changed is not None
    return changed


def _joined(chosen: list[Overrides]) -> Overrides:
    """Later ones take precedence: two chunk sizes become the smaller."""
    return {key: value for overrides in chosen for key, value in overrides.items()}


def _set(section: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of nested frozen dataclasses with one field set."""
    assert any(field.name == path[0] for field in fields(section))
    inner = value if len(path) == 1 else _set(getattr(section, path[0]), path[1:], value)
    return replace(section, **{path[0]: inner})
