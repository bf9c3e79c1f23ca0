"""Expert usage before and after training, and how far routing drifts from the base's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from finetune import log
from finetune.errors import CheckError
from finetune.evaluate.usage import (
    Group,
    UsageFigures,
    group_names,
    heat_pixels,
    token_groups,
    usage_figures,
    usage_table,
    write_usage,
)
from finetune.model.usage import UsageCounter, UsageCounts, changed_share, count_usage
from finetune.train.metrics import MetricsLog, Tracker
from finetune.train.run_directory import Run
from finetune.train.session import Session

USAGE_FILE = "expert_usage.parquet"


@dataclass(frozen=True)
class RoutingSummary:
    """Expert usage of a run, as manifest.json records it.

    Attributes:
        samples: how many examples were measured.
        split: they are from.
        before, after: usage figures by layer, with the base and with the adapter.
        drift: by layer, share of tokens that take another set of experts than in the base.
    """

    samples: int
    split: str
    before: UsageFigures
    after: UsageFigures
    drift: list[float]


class RoutingWatch:
    """Measures routing on the same examples whenever it is asked; the base's own routing is measured once.

    Args:
        session: base, adapter and examples: of the test split, else validation, else training.
        run: where figures are written, on rank 0.
        tracker: gets the figures too.
        between_batches: called between two forward passes; it may raise to stop.
    """

    def __init__(self, session: Session, run: Run, tracker: Tracker, between_batches: Callable[[], None]) -> None:
        self.config, self.base, self.adapter = session.config, session.base, session.adapter
        self.accelerator, self.tracker, self.between_batches = session.accelerator, tracker, between_batches
        self.path, self.metrics = run.path, MetricsLog(run.metrics, writes=run.writes)
        self.split = next(session.splits[name] for name in ("test", "validation", "train") if name in session.splits)
        self._newest: tuple[int, UsageCounts] | None = None  # step and counts

    def measure(self, step: int) -> UsageCounts:
        """Measure now, write the drift by layer to metrics.jsonl, and compare it with the recipe's limit.

        Raises:
            CheckError: a layer's drift is above `evaluate.max_routing_drift`.
        """
        counts = self._count("routing")
        self._newest = step, counts
        drift = changed_share(self._before, counts)
        worst = int(np.argmax(drift))
        text = f"routing: {np.mean(drift):.1%} of tokens take other experts than in the base, most in layer {worst}"
        log.info(f"{text} ({drift[worst]:.1%})")
        figures = usage_figures(counts.chosen.sum(0))
        self.metrics.append("routing", step, drift=drift, entropy=figures.entropy, variation=figures.variation)
        shown = {"routing_drift": float(np.mean(drift)), "routing_drift_most": drift[worst]}
        self.tracker.log(shown | {"routing_entropy": float(np.mean(figures.entropy))}, step)
        limit = self.config.evaluate.max_routing_drift
        if limit is not None and drift[worst] > limit:
            raise CheckError(
                f"routing drifted too far after step {step}: {drift[worst]:.1%} of tokens take other experts in layer "
                f"{worst}, evaluate.max_routing_drift is {limit:.1%}",
                why="the update moves tokens to experts that the base would not have chosen",
                fix="lower trainer.learning_rate, set trainer.router_balance_target=base, or allow more",
            )
        return counts

    def finish(self, step: int, in_training: UsageCounter) -> RoutingSummary:
        """Measure the end and write expert_usage.parquet.

        Args:
            step: the one whose adapter is live; if it was the last to be measured it is not measured again.
            in_training: experts chosen for this rank's training tokens in this session.
        """
        after = self._newest[1] if self._newest is not None and self._newest[0] == step else self.measure(step)
        names = group_names(list(self.split.stats.source_sizes))
        tables = [usage_table("before", self._before, names), usage_table("after", after, names)]
        if table := self._training_table(in_training):
            tables.append(table)
        if self.accelerator.is_main_process:
            write_usage(self.path / USAGE_FILE, tables)
            for when, counts in (("before", self._before), ("after", after)):
                self.tracker.log_image(f"expert_usage_{when}", heat_pixels(counts.chosen.sum(0)), step)
        return RoutingSummary(
            samples=len(self._numbers),
            split=self.split.name,
            before=usage_figures(self._before.chosen.sum(0)),
            after=usage_figures(after.chosen.sum(0)),
            drift=changed_share(self._before, after),
        )

    @functools.cached_property
    def _before(self) -> UsageCounts:
        with self.adapter.disabled():
            return self._count("routing of the base")

    @functools.cached_property
    def _numbers(self) -> list[int]:
        """Indices of the measured examples, evenly spread over the split."""
        total, count = len(self.split.examples), self.config.evaluate.routing_examples
        return [number * total // min(count, total) for number in range(min(count, total))]

    def _count(self, task: str) -> UsageCounts:
        examples = [self.split.examples[number] for number in self._numbers]
        ends = np.cumsum(list(self.split.stats.source_sizes.values()))
        sources = np.searchsorted(ends, self._numbers, side="right")
        return count_usage(
            self.base,
            examples,
            self.config.data.max_length,
            lambda number: token_groups(examples[number], int(sources[number])),
            len(group_names(list(self.split.stats.source_sizes))),
            task=task,
            between_batches=self.between_batches,
        )

    def _training_table(self, counter: UsageCounter) -> pa.Table | None:
        tokens, chosen, gates = (
            self.accelerator.reduce(sums, "sum").cpu().numpy()
            for sums in (counter.tokens, counter.chosen, counter.gates)
        )
        if not tokens[0]:
            return None
        none = np.zeros((0, 0, 0), dtype=np.int16)
        counts = UsageCounts(tokens, chosen.swapaxes(0, 1), gates.swapaxes(0, 1), none)
        return usage_table("training", counts, [Group("all", "all")])
