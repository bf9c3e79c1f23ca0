"""One optimiser step: micro-batches forward and backward, the checks before the update, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from finetune import log
from finetune.adapters.lora import Adapter
from finetune.config.schema import TrainerConfig
from finetune.data.batches import Batch
from finetune.errors import CapacityError, CheckError, is_out_of_memory
from finetune.model.build import Base
from finetune.model.forward import record_router
from finetune.model.offload import CheckpointOffload
from finetune.model.usage import UsageCounter
from finetune.objectives.base import LOSS, Objective, Policy, Term
from finetune.objectives.router import RouterContext, RouterTerms, real_tokens
from finetune.objectives.sft import Sft
from finetune.train.engines.base import Engine
from finetune.train.failures import NotFinite, OutOfMemory, named_examples


@dataclass(frozen=True)
class StepStats:
    """Measurements of one optimiser step.

    Attributes:
        terms: by name, the objective's terms (`loss` first) and the router's, over the whole step.
        gradient_norm: before clipping.
        tokens, trained_tokens: without padding, of all ranks.
    """

    terms: dict[str, float]
    gradient_norm: float
    tokens: int
    trained_tokens: int

    @property
    def loss(self) -> float:
        """The objective's loss."""
        return self.terms[LOSS]

    @property
    def is_finite(self) -> bool:
        """Whether every number of the step is finite."""
        return all(map(math.isfinite, (*self.terms.values(), self.gradient_norm)))


class OptimiserStep:
    """Callable that makes one optimiser step.

    What is minimised is the objective's loss plus the router's terms times their coefficients. Every term is a share of
    the whole step (all micro-batches, all ranks), so that 8 micro-batches of 1 sequence equal 1 of 8, ragged and
    partial ones included.

    Args:
        config: the router's coefficients, and what to do when memory runs out.
        base: frozen, with the adapter attached.
        engine: stores the adapter and its optimiser.
        adapter: to be disabled for reference values; the balance target `base` and some objectives need it.
        objective: what is minimised. None: supervised fine-tuning.

    Attributes:
        parts: batches that each micro-batch is split into; doubled when memory ran out.
        usage: counts the experts chosen for all training tokens of this rank.
    """

    def __init__(
        self,
        config: TrainerConfig,
        base: Base,
        engine: Engine,
        adapter: Adapter | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.config, self.base, self.engine, self.world, self.adapter = config, base, engine, engine.world, adapter
        self.objective: Objective = objective or Sft()
        self.parts = 1
        self.router = RouterTerms(config, base, adapter, engine.accelerator)
        arch = base.checkpoint.arch
        self.usage = UsageCounter(arch.num_layers, arch.num_experts, 1, base.device)
        offload: AbstractContextManager[object] = nullcontext()
        if config.activation_offload:
            offload = CheckpointOffload(base.device, arch.hidden, base.compute_dtype)
        self.policy = Policy(base.model, offload)
        self._factors = {LOSS: 1.0} | self.router.coefficients  # of the terms that are minimised
        self._reductions: dict[str, Literal["sum", "max"]] = {}  # of every term, in the order of the columns
        self._coefficients = torch.empty(0, device=base.device)

    def __call__(
        self,
        batches: list[Batch],
        learning_rate: float,
        number: int,
        *,
        begin: Callable[[], None] = lambda: None,
        before_update: Callable[[], None] = lambda: None,
        heartbeat: Callable[[str], None] = lambda _: None,
    ) -> StepStats:
        """Accumulate gradients over micro-batches and update once.

        Args:
            batches: this rank's micro-batches.
            learning_rate: of this step.
            number: of the step from 1, for messages.
            begin: seeds torch; called again when the step is begun again.
            before_update: called when all gradients are there and finite.
            heartbeat: called with what begins now.

        Raises:
            CheckError: no token of the step is trained.
            NotFinite: a term or a gradient is not finite; no update was made.
            CapacityError: another rank is out of memory, and smaller micro-batches are not wanted or not possible.
        """
        self.base.model.train()
        totals = self._totals(batches, number)
        while True:
            begin()
            pieces = [piece for batch in batches for piece in batch.parts(self.parts)]
            try:
                terms = self._accumulate(pieces, totals, heartbeat)
                break
            except OutOfMemory as error:
                self._split_further(batches, error.cause)
        heartbeat("exchanging gradients")
        self.engine.reduce_gradients()
        stats = self._stats(batches, torch.stack(terms), self.engine.gradient_norm())
        if not stats.is_finite:
            self.engine.zero_grad()
            what = f"step {number} is not finite: loss {stats.loss}, gradient norm {stats.gradient_norm}"
            raise NotFinite(what, terms, pieces, self.world)
        before_update()
        set_learning_rate(self.engine, learning_rate)
        self.engine.step()
        self.engine.zero_grad()
        return stats

    def _totals(self, batches: Sequence[Batch], number: int) -> dict[str, float]:
        """Denominators of the step's terms, over all micro-batches and ranks."""
        weights = [self.objective.weights(batch) for batch in batches]
        names = list(weights[0])
        totals = self.world.all_reduce_sum(*(sum(of_batch[name] for of_batch in weights) for name in names))
        if totals[names.index(LOSS)] == 0:
            raise CheckError(
                f"step {number} has no trained token: its loss would be 0 / 0",
                why=f"examples: {named_examples(batches)}",
                fix="look at the loss weights of the data",
            )
        return dict(zip(names, totals, strict=True))

    def _accumulate(
        self, batches: Sequence[Batch], totals: dict[str, float], heartbeat: Callable[[str], None]
    ) -> list[Tensor]:
        """Forward and backward of all micro-batches: the shares of the step's terms, float32 [terms] each.

        Raises:
            OutOfMemory: on this rank or another.
        """
        heartbeat("preparing the step")
        contexts = self._prepared(batches)
        routing = self.router.prepare(batches)
        shares: list[Tensor] = []
        failure: BaseException | None = None
        for number, batch in enumerate(batches):
            heartbeat(f"micro-batch {number + 1} of {len(batches)}")
            try:
                forward = partial(self._forward, batch, totals, contexts[number], routing, number)
                terms = self.engine.prepare_forward(forward, last=number + 1 == len(batches))()
                # Engines average gradients over ranks; each term is a share of the whole step's already, so undo that.
                self.engine.backward((terms * self._coefficients).sum() * self.world.world_size)
            except (MemoryError, RuntimeError) as error:
                # Without retry the other ranks are waiting inside a layer, and cannot be asked.
                if not is_out_of_memory(error) or not self.engine.can_retry:
                    raise
                failure = error.with_traceback(None)  # a traceback keeps tensors alive
                break
            shares.append(terms.detach())
        heartbeat("waiting for the other ranks")
        if self.world.all_reduce_max(int(failure is not None)):
            raise OutOfMemory(failure)
        return shares

    def _prepared(self, batches: Sequence[Batch]) -> Sequence[Any]:
        """The objective's context of each micro-batch, such as reference values.

        Raises:
            OutOfMemory: on this rank or another.
        """
        contexts: Sequence[Any] = ()
        failure: BaseException | None = None
        try:
            contexts = self.objective.prepare(batches, self.policy, self.adapter, self.world)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not self.engine.can_retry:
                raise
            failure = error.with_traceback(None)
        if self.world.all_reduce_max(int(failure is not None)):
            raise OutOfMemory(failure)
        return contexts

    def _forward(
        self, batch: Batch, totals: dict[str, float], context: Any, routing: RouterContext, number: int
    ) -> Tensor:
        """A micro-batch's shares of the step's terms, float32 [terms]: the objective's, then the router's."""
        with record_router(self.base.model) as tape:
            terms = self.objective.terms(self.policy, batch, totals, context)
        if len(tape.layers) != self.base.checkpoint.arch.num_layers:
            passes = len(tape.layers) / self.base.checkpoint.arch.num_layers
            raise ValueError(
                f"an objective runs one forward pass per micro-batch, this one ran {passes:g} forward passes"
            )
        tokens = real_tokens(batch).to(self.base.device)
        self.usage.add(tape.layers, tokens)
        terms = terms | self.router.terms(tape.layers, tokens, routing, number)
        self._set_columns(terms)
        return torch.stack(
            [term.value if name in self._factors else term.value.detach() for name, term in terms.items()]
        )

    def _set_columns(self, terms: Mapping[str, Term]) -> None:
        """Take the terms of the first micro-batch as the columns of every later one."""
        reductions = {name: term.reduce for name, term in terms.items()}
        if not self._reductions:
            self._reductions = reductions
            factors = [self._factors.get(name, 0.0) for name in reductions]
            self._coefficients = torch.tensor(factors, device=self.base.device)
        elif reductions != self._reductions:
            raise ValueError(f"an objective's terms are the same in every batch: {self._reductions}, then {reductions}")

    def _split_further(self, batches: Sequence[Batch], cause: BaseException | None) -> None:
        """Halve the micro-batches, on every rank; groups of sequences stay together.

        Raises:
            CapacityError: that is not wanted or not possible; the rank where memory ran out raises its own error.
        """
        self.engine.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failed = [str(rank) for rank, has_failed in enumerate(self.world.all_gather(cause is not None)) if has_failed]
        most_groups = self.world.all_reduce_max(max(batch.num_groups for batch in batches))
        if not self.config.halve_micro_batch_on_oom or self.parts >= most_groups:
            raise cause or CapacityError(f"rank {', '.join(failed)} is out of memory", fix="see its output")
        self.parts *= 2
        where = f"rank {', '.join(failed)} is " if self.world.world_size > 1 else ""
        log.warning(
            f"{where}out of memory: micro-batches are split into {self.parts} from here on; steps stay the same"
        )

    def _stats(self, batches: Sequence[Batch], shares: Tensor, gradient_norm: float) -> StepStats:
        """Combine shares [micro-batches, terms] over micro-batches and ranks."""
        *sums, tokens, trained = self.world.all_reduce_sum(
            *shares.sum(0).tolist(),
            sum(batch.num_tokens for batch in batches),
            sum(int(batch.weights.count_nonzero()) for batch in batches),
        )
        terms = dict(zip(self._reductions, sums, strict=True))
        for column, (name, reduction) in enumerate(self._reductions.items()):
            if reduction == "max":
                terms[name] = self.world.all_reduce_max(float(shares[:, column].max()))
        return StepStats(terms, gradient_norm, int(tokens), int(trained))


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in engine.param_groups:
        group["lr"] = learning_rate
