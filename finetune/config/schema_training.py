"""The `adapter`, `objective` and `trainer` sections of a recipe: what is trained, for what, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from finetune.config.fields import Strict

AttentionTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, kw_only=True)
class AttentionAdapterConfig(Strict):
    """LoRA on the attention projections.

    Attributes:
        rank: rank of the update; higher has more capacity and takes more memory. 0 leaves attention frozen.
        alpha: the update is scaled by alpha / rank.
        targets: which projections.
        dropout: share of a projection's inputs that the update does not see in a training step; none at inference.
    """

    rank: Annotated[int, Ge(0)] = 16
    alpha: Annotated[float, Gt(0)] = 32.0
    targets: tuple[AttentionTarget, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertAdapterConfig(Strict):
    """LoRA on both projections of the routed experts.

    Attributes:
        rank: rank of each expert's update, or the mean rank where ranks follow use (`rank_by`); memory grows with it
            times the number of experts. 0 leaves the experts frozen.
        rank_by: `uniform` gives each adapted expert `rank`. `gate` and `tokens` distribute the same total rank per
            layer, and so the same number of parameters, in proportion to how much the training examples use each
            expert (by router weight, or by number of routed tokens); an expert whose share rounds to 0 gets none. A
            FILE written by `finetune experts score` ranks by the score it was made with; a run's experts.json gives
            the same ranks again.
        max_rank: the highest rank of an expert under `rank_by`; null: 4 times `rank`. PEFT, vLLM and SGLang store one
            rank per layer: their files have this rank for every expert, filled up with zeros.
        alpha: the update is scaled by alpha / rank, with each expert's own rank.
        dropout: only 0. PEFT's format adapts expert weights as W + BA, in which dropping inputs of BA alone cannot be
            expressed; the key exists to say so.
        select: which experts of each layer are adapted. `all`; `top_k=8`, the 8 that the training examples use most;
            `top_p=0.2`, the most used ones that together receive 20 % of the router weight; or a FILE written by
            `finetune experts score`. Parameters, gradients and optimiser states exist for the selected ones only.
        share: `a` is one A per layer and projection for all its experts, with a B for each; `b` the reverse; `none`
            both for each expert. The adapter's files repeat the shared factor for each expert.
    """

    rank: Annotated[int, Ge(0)] = 4
    rank_by: str = "uniform"
    max_rank: Annotated[int, Ge(1)] | None = None
    alpha: Annotated[float, Gt(0)] = 8.0
    dropout: float = 0.0
    select: str = "all"
    share: Literal["none", "a", "b"] = "none"


@dataclass(frozen=True, kw_only=True)
class RouterAdapterConfig(Strict):
    """Training of the routers.

    Attributes:
        mode: `frozen`; `lora` on each router's weight; `full` trains a change of the whole weight and bias. A full
            change of the weight is stored as LoRA of rank E; the change of the bias fits into no third-party adapter
            format, so only merged exports contain it.
        rank, alpha: of `lora`.
    """

    mode: Literal["frozen", "lora", "full"] = "frozen"
    rank: int = 8
    alpha: Annotated[float, Gt(0)] = 16.0


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Strict):
    """The trained parameters.

    Attributes:
        rslora: scale updates by alpha / sqrt(rank) instead of alpha / rank, so that a higher rank is not weaker.
        layers: the first and the last adapted layer, both included, counted from 0. None: every layer.
        dtype: dtype of the LoRA parameters. `bfloat16` halves them; updates are computed in float32 and rounded
            stochastically, so that small ones are not lost.
        init_from: directory of an adapter to continue training from; ranks, alphas and base must match. None: A is
            random and B zero.
    """

    attention: AttentionAdapterConfig = field(default_factory=AttentionAdapterConfig)
    experts: ExpertAdapterConfig = field(default_factory=ExpertAdapterConfig)
    router: RouterAdapterConfig = field(default_factory=RouterAdapterConfig)
    rslora: bool = False
    layers: tuple[int, int] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    init_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Strict):
    """The training loop and the optimiser.

    Attributes:
        epochs: passes over the training examples; a fraction stops inside a pass.
        max_steps: stop after this many optimiser steps even if epochs are left. None: no such limit.
        micro_batch_size: packed sequences in one forward and backward pass.
        gradient_accumulation_steps: micro-batches per optimiser step and rank.
        learning_rate: the peak, reached at the end of the warm-up. None: the objective's default (sft 2e-4, preference
            2e-5), which the run prints and stores.
        optimizer: `adamw` is torch's; `adamw_8bit` keeps its moments in 8 bits (bitsandbytes); `paged_adamw` and
            `paged_adamw_8bit` keep them in memory that moves between GPU and host as needed (bitsandbytes, GPU only).
        optimizer_states_on_cpu: keep the moments in host memory and copy them to the GPU one parameter at a time.
        gradient_dtype: dtype in which gradients are summed over micro-batches. `bfloat16` needs adapter.dtype=bfloat16,
            halves them, and rounds the sum after every micro-batch.
        schedule: how the learning rate falls from the peak after the warm-up.
        min_lr_ratio: the learning rate at the end, relative to the peak.
        warmup_ratio: share of all steps in which the rate rises from peak / warm-up steps to the peak.
        weight_decay: AdamW's decoupled weight decay.
        adam_beta1, adam_beta2: decay of AdamW's averages of gradients and of their squares.
        adam_eps: added to the root of the second average, so that tiny gradients are not amplified.
        max_grad_norm: gradients are scaled down to this norm; 0 turns clipping off (the norm is still checked).
        router_balance_coefficient: weight of the per-layer balance loss. The published config's 0.9 is a
            pre-training value and ruins a fine-tune: above 0.1 is refused unless forced.
        force_router_balance_coefficient: allow a coefficient above 0.1.
        router_balance_scope: over which tokens routing is balanced: each `microbatch` by itself, or the whole
            optimiser `step` of all ranks, which lets single sequences specialise and costs one more forward pass.
        router_balance_target: `uniform`, every expert equally often; or `base`, as often as the base without the
            adapter uses it on the same tokens, so that learned specialisation stays. That is one more forward pass.
        router_z_loss_coefficient: weight of the mean squared log-sum-exp of the router's logits, which keeps them
            small; 0.001 is what was published for pre-training.
        activation_checkpointing: recompute each layer in the backward pass; less memory, more compute.
        activation_offload: keep what activation checkpointing saves (each layer's input) in CPU memory, copied
            during the computation; less GPU memory for long sequences. Only on a GPU.
        early_stop_patience: stop after this many evaluations without a better best metric. None: never.
        on_nonfinite: what happens to a step whose loss or gradient is not finite on any rank. `stop` ends the run
            before the update; `skip` skips the update, and ends the run after 10 skipped steps in a row. Either way
            the step's examples are written to `nonfinite/` in the run directory.
        halve_micro_batch_on_oom: when a micro-batch does not fit into memory, halve its size and double the number of
            micro-batches from then on, on every rank; the optimiser step stays the same.
        ignore_memory_estimate: start although the estimate says that the run does not fit into memory.
    """

    epochs: Annotated[float, Gt(0)] = 1.0
    max_steps: Annotated[int, Ge(1)] | None = None
    micro_batch_size: Annotated[int, Ge(1)] = 1
    gradient_accumulation_steps: Annotated[int, Ge(1)] = 8
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    optimizer_states_on_cpu: bool = False
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    learning_rate: Annotated[float, Gt(0), Le(1000)] | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    warmup_ratio: Annotated[float, Ge(0), Le(1)] = 0.03
    weight_decay: Annotated[float, Ge(0)] = 0.0
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    router_balance_coefficient: Annotated[float, Ge(0)] = 0.001
    force_router_balance_coefficient: bool = False
    router_balance_scope: Literal["microbatch", "step"] = "microbatch"
    router_balance_target: Literal["uniform", "base"] = "uniform"
    router_z_loss_coefficient: Annotated[float, Ge(0)] = 0.0
    activation_checkpointing: bool = True
    activation_offload: bool = False
    early_stop_patience: Annotated[int, Ge(1)] | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    halve_micro_batch_on_oom: bool = False
    ignore_memory_estimate: bool = False

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate` of a whole configuration, where it is never None.

        Raises:
            ValueError: this section is used alone and leaves the rate to an objective.
        """
        if self.learning_rate is None:
            raise ValueError("trainer.learning_rate is null and there is no objective whose default it could be")
        return self.learning_rate
