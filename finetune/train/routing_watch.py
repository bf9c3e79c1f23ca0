"""Where tokens go, before and after training: which experts are used, and how far routing drifts from the base's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import Accelerator

from finetune import log
from finetune.adapters.lora import Adapter
from finetune.config.schema import RunConfig
from finetune.data.dataset import Split
from finetune.errors import CheckError
from finetune.evaluate.usage import (
    Group,
    group_names,
    heat_pixels,
    token_groups,
    usage_figures,
    usage_table,
    write_usage,
)
from finetune.model.build import Base
from finetune.model.usage import UsageCounter, UsageCounts, changed_share, count_usage
from finetune.train.metrics import MetricsLog, Tracker
from finetune.train.run_directory import RunDirectory

USAGE_FILE = "expert_usage.parquet"


@dataclass(frozen=True, eq=False)
class RoutingWatch:
    """Measures routing on the same samples whenever it is asked; what the base does with them is measured once.

    Attributes:
        config: the run's.
        base, adapter: live.
        split: where the samples are from.
        run, tracker, accelerator: where figures go; only the main process writes.
        between_batches: called between two forward passes; raises to leave early.
        seen: the newest look, by its step.
    """

    config: RunConfig
    base: Base
    adapter: Adapter
    split: Split
    run: RunDirectory
    tracker: Tracker
    accelerator: Accelerator
    between_batches: Callable[[], None]
    seen: dict[int, UsageCounts] = field(default_factory=dict)

    def look(self, step: int) -> UsageCounts:
        """Measure now, write the drift by layer to metrics.jsonl, and hold it against the recipe's limit.

        Raises:
            CheckError: a layer's drift is above `evaluate.max_routing_drift`.
        """
        counts = self._count("routing")
        self.seen.clear()
        self.seen[step] = counts
        drift = changed_share(self._before, counts)
        worst = int(np.argmax(drift))
        text = f"routing: {np.mean(drift):.1%} of tokens take other experts than in the base, most in layer {worst}"
        log.info(f"{text} ({drift[worst]:.1%})")
        figures = usage_figures(counts.chosen.sum(0))
        if self.accelerator.is_main_process:
            line = {"drift": drift, "entropy": figures.entropy, "variation": figures.variation}
            MetricsLog(self.run.metrics).append("routing", step, **line)
        shown = {"routing_drift": float(np.mean(drift)), "routing_drift_most": drift[worst]}
        self.tracker.log(shown | {"routing_entropy": float(np.mean(figures.entropy))}, step)
        limit = self.config.evaluate.max_routing_drift
        if limit is not None and drift[worst] > limit:
            raise CheckError(
                f"routing drifted too far after step {step}: {drift[worst]:.1%} of tokens take other experts in layer "
                f"{worst}, evaluate.max_routing_drift is {limit:.1%}",
                why="the update moves tokens to experts that the base would not have taken",
                fix="lower trainer.learning_rate, set trainer.router_balance_target=base, or allow more",
            )
        return counts

    def finish(self, step: int, in_training: UsageCounter) -> dict[str, Any]:
        """Measure the end, write expert_usage.parquet, and give the manifest what the report shows.

        Args:
            step: the one whose adapter is live; what was seen after it is not measured again.
            in_training: what routers chose on the training tokens of this sitting, of this process.
        """
        after = self.seen.get(step) or self.look(step)
        names = group_names(list(self.split.stats.source_sizes))
        tables = [usage_table("before", self._before, names), usage_table("after", after, names)]
        if table := self._training_table(in_training):
            tables.append(table)
        facts: dict[str, Any] = {
            "samples": len(self._numbers),
            "split": self.split.name,
            "before": asdict(usage_figures(self._before.chosen.sum(0))),
            "after": asdict(usage_figures(after.chosen.sum(0))),
            "drift": changed_share(self._before, after),
        }
        if self.accelerator.is_main_process:
            write_usage(self.run.path / USAGE_FILE, tables)
            for when, counts in (("before", self._before), ("after", after)):
                self.tracker.log_image(f"expert_usage_{when}", heat_pixels(counts.chosen.sum(0)), step)
        return facts

    @functools.cached_property
    def _before(self) -> UsageCounts:
        with self.adapter.disabled():
            return self._count("routing of the base")

    @functools.cached_property
    def _numbers(self) -> list[int]:
        """Samples that are measured, evenly spread over the split."""
        total, count = len(self.split.examples), self.config.evaluate.routing_examples
        return [number * total // min(count, total) for number in range(min(count, total))]

    def _count(self, task: str) -> UsageCounts:
        samples = [self.split.examples[number] for number in self._numbers]
        ends = np.cumsum(list(self.split.stats.source_sizes.values()))
        sources = np.searchsorted(ends, self._numbers, side="right")
        return count_usage(
            self.base,
            samples,
            self.config.data.max_length,
            lambda number: token_groups(samples[number], int(sources[number])),
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
