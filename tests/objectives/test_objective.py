"""The objective interface: a custom objective, named terms, and groups of sequences that stay together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from router_runs import Run, samples
from tolerances import largest_share, step_with_noise
from torch import Tensor

from finetune.adapters.lora import Adapter
from finetune.data.batches import Batch, collate, padding_batch
from finetune.model.forward import shift_labels
from finetune.objectives.base import Policy, Ranks, Term
from finetune.objectives.router import BALANCE_LOSS, Z_LOSS
from finetune.train.step import OptimiserStep
from finetune.train.world import SINGLE_PROCESS


@dataclass(frozen=True)
class SmoothConfig:
    """Configuration of the objective below, as in `config/schema_training.py`."""

    epsilon: float = 0.1


class Smooth:
    """Negative log-likelihood with label smoothing: a share epsilon of the target is spread over the vocabulary."""

    def __init__(self, config: SmoothConfig) -> None:
        self.config = config

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"loss": batch.weight_sum}

    def prepare(
        self, batches: Sequence[Batch], policy: Policy, adapter: Adapter | None, world: Ranks
    ) -> Sequence[None]:
        return [None] * len(batches)

    def terms(self, policy: Policy, batch: Batch, totals: Mapping[str, float], context: None) -> dict[str, Term]:
        where, targets, weights = shift_labels(batch.input_ids, batch.weights, batch.segments)
        logits = policy.hidden_states(batch).flatten(0, 1)[where] @ policy.head.T
        smoothed = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.config.epsilon)
        exact = F.cross_entropy(logits, targets, reduction="none")
        return {
            "loss": Term((smoothed * weights).sum() / totals["loss"]),
            "nll": Term((exact * weights).sum() / totals["loss"]),
            "largest_logit": Term(logits.max() if len(where) else logits.new_tensor(-torch.inf), reduce="max"),
        }


def run_of(base: Path, objective: Any = None, **trainer: Any) -> Run:
    run = Run(base, **({"router_balance_coefficient": 0.0} | trainer))
    run.step.engine.world = SINGLE_PROCESS
    run.step = OptimiserStep(run.step.config, run.base, run.step.engine, run.adapter, objective)
    return run


def one_by_one(data: Sequence[Any]) -> list[Batch]:
    return [collate([[each]]) for each in data]


def test_without_smoothing_it_is_supervised_fine_tuning(tiny_base: Path) -> None:
    batches = one_by_one(samples(3))
    sft, plain, smooth = (run_of(tiny_base, each) for each in (None, Smooth(SmoothConfig(0.0)), Smooth(SmoothConfig())))
    (wanted, noise), same, other = step_with_noise(sft, batches), plain(batches), smooth(batches)
    assert abs(same.loss - wanted.loss) <= noise.loss < 1e-4
    assert largest_share(plain.gradients, sft.gradients) <= noise.gradients < 1e-3
    assert abs(other.loss - wanted.loss) > 1e-3 and abs(other.terms["nll"] - wanted.loss) <= noise.loss
    assert largest_share(smooth.gradients, sft.gradients) > 1e-2, "the comparison of gradients can fail"


def test_terms_have_their_names_and_only_the_loss_has_a_gradient(tiny_base: Path) -> None:
    class Louder(Smooth):
        def terms(self, *args: Any) -> dict[str, Term]:
            terms = super().terms(*args)
            return terms | {"nll": replace(terms["nll"], value=terms["nll"].value * 1000)}

    batches = one_by_one(samples(3))
    plain, louder = (run_of(tiny_base, each(SmoothConfig())) for each in (Smooth, Louder))
    stats = plain(batches)
    assert list(stats.terms) == ["loss", "nll", "largest_logit", BALANCE_LOSS, Z_LOSS]
    assert louder(batches).terms["nll"] == pytest.approx(1000 * stats.terms["nll"], rel=1e-6)
    assert all(torch.equal(plain.gradients[name], louder.gradients[name]) for name in plain.gradients)


def test_a_step_has_the_same_terms_however_it_is_split(tiny_base: Path) -> None:
    data = samples(4)
    together, apart = (run_of(tiny_base, Smooth(SmoothConfig())) for _ in range(2))
    whole, noise = step_with_noise(together, [collate([data])])
    split = apart([*one_by_one(data), padding_batch()])
    for name in ("nll", "largest_logit"):
        assert abs(split.terms[name] - whole.terms[name]) <= noise.terms[name] < 1e-3
    assert largest_share(apart.gradients, together.gradients) <= noise.gradients < 1e-3


def test_violations_of_the_objective_contract_are_refused(tiny_base: Path) -> None:
    class Changing(Smooth):
        calls = 0

        def terms(self, *args: Any) -> dict[str, Term]:
            self.calls += 1
            return super().terms(*args) | {f"extra_{self.calls}": Term(torch.zeros(()))}

    class Twice(Smooth):
        def terms(self, policy: Policy, batch: Batch, *args: Any) -> dict[str, Term]:
            policy.hidden_states(batch)
            return super().terms(policy, batch, *args)

    with pytest.raises(ValueError, match="terms are the same in every batch"):
        run_of(tiny_base, Changing(SmoothConfig()))(one_by_one(samples(2)))
    with pytest.raises(ValueError, match="2 forward passes"):
        run_of(tiny_base, Twice(SmoothConfig()))(one_by_one(samples(1)))


def test_groups_of_sequences_stay_together() -> None:
    data = samples(6)
    batch = replace(collate([[each] for each in data]), group_sizes=(2, 1, 3))
    assert batch.num_groups == 3 and len(batch.parts(99)) == 3
    ids = [[names[0] for names in part.example_ids] for part in batch.parts(2)]
    assert ids == [["s0", "s1", "s2"], ["s3", "s4", "s5"]]
    assert [part.group_sizes for part in batch.parts(2)] == [(2, 1), (3,)]
    joined = torch.cat([part.input_ids for part in batch.parts(3)])
    assert torch.equal(joined, batch.input_ids)


def test_without_groups_parts_are_those_of_tensor_split() -> None:
    batch = collate([[each] for each in samples(7)])
    for count in (1, 2, 3, 4, 7, 9):
        wanted: Sequence[Tensor] = batch.weights.tensor_split(min(count, 7))
        parts = batch.parts(count)
        assert [part.example_ids for part in parts] == [
            tuple(batch.example_ids[sum(map(len, wanted[:n])) : sum(map(len, wanted[: n + 1]))])
            for n in range(len(wanted))
        ]
        assert all(torch.equal(part.weights, piece) for part, piece in zip(parts, wanted, strict=True))


def test_out_of_memory_never_splits_a_group(tiny_base: Path) -> None:
    """Two pairs: more than two sequences run out of memory, then each pair is a micro-batch of its own."""

    class Hungry(Smooth):
        sizes: list[int]

        def terms(self, policy: Policy, batch: Batch, *args: Any) -> dict[str, Term]:
            self.sizes.append(len(batch.example_ids))
            if len(batch.example_ids) > 2:
                raise torch.OutOfMemoryError("made up for a test")
            return super().terms(policy, batch, *args)

    hungry = Hungry(SmoothConfig())
    hungry.sizes = []
    data = replace(collate([[each] for each in samples(4)]), group_sizes=(2, 2))
    run_of(tiny_base, hungry, halve_micro_batch_on_oom=True)([data])
    assert hungry.sizes == [4, 2, 2]
    whole = replace(data, group_sizes=(4,))
    with pytest.raises(torch.OutOfMemoryError):
        run_of(tiny_base, hungry, halve_micro_batch_on_oom=True)([whole])
