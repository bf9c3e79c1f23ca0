"""Every key a recipe may set, as frozen dataclasses: the one definition that composing, checking and docs read.

No import of torch or Hydra here: `finetune --help` and `finetune config` stay quick. Defaults are the ones argued for
in docs/design.md; a recipe states only what differs. Units stand in the names; `None` means "not set" and each
docstring says what follows from that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from finetune.config.schema_data import DataConfig as DataConfig
from finetune.config.schema_data import DataForm as DataForm
from finetune.config.schema_data import LossConfig as LossConfig
from finetune.config.schema_data import ReasoningEffortName as ReasoningEffortName
from finetune.config.schema_data import SourceConfig as SourceConfig
from finetune.config.schema_data import Strict as Strict
from finetune.config.schema_data import ValidationSplitConfig as ValidationSplitConfig

AttentionTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Strict):
    """The frozen base.

    Attributes:
        path: a checkpoint directory in the published layout, or a hub name such as `openai/gpt-oss-20b`.
        revision: branch, tag or commit of a hub name; the commit it resolves to is recorded. None: the hub's default.
        device: `auto` takes the first GPU if there is one.
        compute_dtype: dtype of activations and of every base tensor that is not packed. `auto`: bfloat16 on a GPU,
            float32 on a CPU.
        expert_storage: how expert weights are held; checked against what was loaded. `mxfp4` as published, 4.25 bits a
            weight; `nf4` rounded once more to bitsandbytes' NF4, 4.5 bits; `bfloat16` the same values as `mxfp4` in 16.
        attention_storage: how the frozen q, k, v and o weights are held: `compute` in the compute dtype, `nf4` rounded
            to bitsandbytes' NF4. `nf4` in either is another base than the checkpoint, and the adapter records it.
        embedding_on_cpu: keep the input embedding in host memory; the rows of a micro-step's tokens are copied.
        expert_kernel: how the experts are computed. `triton` is the fused path for NVIDIA GPUs (Ampere and newer),
            `reference` plain PyTorch; same result up to rounding. `auto`: Triton where it runs and agrees with the
            reference at start-up, else the reference; the choice is printed with its reason.
        experts_per_chunk: how many experts are dequantised at a time; scratch memory grows with it.
        attention_kernel: how attention is computed. `flash` is torch's own flash kernel with sinks, `reference` plain
            PyTorch; same result up to rounding. `auto`: flash where it runs and agrees with the reference at start-up
            (a GPU from Ampere on, or a CPU), else the reference; the choice is printed with its reason.
        identity: the base's identity as an earlier run printed it, or its beginning; another base is refused, so that
            a flipped bit in a checkpoint without `checksums.json` shows. None: not compared.
        verify_checksums: compare shards with the checkpoint's `checksums.json` when it has one.
    """

    path: str
    revision: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    expert_storage: Literal["mxfp4", "nf4", "bfloat16"] = "mxfp4"
    attention_storage: Literal["compute", "nf4"] = "compute"
    embedding_on_cpu: bool = False
    expert_kernel: Literal["auto", "triton", "reference"] = "auto"
    experts_per_chunk: int = 16
    attention_kernel: Literal["auto", "flash", "reference"] = "auto"
    identity: str | None = None
    verify_checksums: bool = True


@dataclass(frozen=True, kw_only=True)
class AttentionAdapterConfig(Strict):
    """LoRA on the attention projections.

    Attributes:
        rank: of the update; higher has more capacity and takes more memory. 0 leaves attention alone.
        alpha: the update is scaled by alpha / rank.
        targets: which projections.
        dropout: share of a projection's inputs that the update does not see in a training step; nothing at inference.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[AttentionTarget, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertAdapterConfig(Strict):
    """LoRA on both projections of the routed experts.

    Attributes:
        rank: of each expert's update, or the mean of their ranks where these follow use (`rank_by`); memory grows with
            it times the experts. 0 leaves the experts alone.
        rank_by: `uniform` gives each adapted expert `rank`. `gate` and `tokens` deal out as many ranks a layer, and so
            as many parameters, in proportion to how much the training rows use each expert (by the router's weights,
            or by choices): more where more is learnt, none for an expert whose share rounds to 0. A FILE that
            `finetune experts score` wrote gives them by the score it was made with; a run's experts.json as they are.
        max_rank: the highest rank of an expert under `rank_by`; null: 4 times `rank`. Files of others have this rank
            for every expert, filled up with zeros.
        alpha: the update is scaled by alpha / rank, with each expert's own rank.
        dropout: only 0; the key is there to say why (an expert's update in PEFT's format is a weight W + BA, in which
            dropping inputs of BA alone cannot be written).
        select: which experts of each layer are adapted. `all`; `top_k=8`, the 8 that the training rows use most;
            `top_p=0.2`, as many of the most used as together take 20 % of the gate; or a FILE that `finetune experts
            score` wrote. Parameters, gradients and optimiser states exist for the chosen ones only.
        share: `a` is one A per layer and projection for all its experts, with a B for each; `b` the reverse; `none`
            both for each expert. Written out for each expert in the adapter's files.
    """

    rank: int = 4
    rank_by: str = "uniform"
    max_rank: int | None = None
    alpha: float = 8.0
    dropout: float = 0.0
    select: str = "all"
    share: Literal["none", "a", "b"] = "none"


@dataclass(frozen=True, kw_only=True)
class RouterAdapterConfig(Strict):
    """What of the routers is trained.

    Attributes:
        mode: `frozen`; `lora` on each router's weight; `full` trains a change of the whole weight and bias. A full
            change of the weight is written as LoRA of rank E; that of the bias fits into no adapter file of others:
            only merged exports carry it.
        rank, alpha: of `lora`.
    """

    mode: Literal["frozen", "lora", "full"] = "frozen"
    rank: int = 8
    alpha: float = 16.0


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Strict):
    """What is trained.

    Attributes:
        rslora: scale updates by alpha / sqrt(rank) instead of alpha / rank, so that a higher rank does not act weaker.
        layers: the first and the last layer adapted, both included, counted from 0. None: every layer.
        dtype: dtype in which LoRA parameters are kept. `bfloat16` halves them; updates are worked out in float32 and
            rounded stochastically, so that small ones are not lost.
        init_from: directory of an adapter to train on from; ranks, alphas and base must match. None: A random, B zero.
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
    """How it is trained.

    Attributes:
        epochs: passes over the training rows; a fraction stops inside a pass.
        max_steps: stop after this many optimiser steps even if epochs are left. None: no such limit.
        micro_batch_size: packed rows in one forward and backward.
        gradient_accumulation_steps: micro-steps accumulated in one optimiser step (per process).
        learning_rate: the peak, reached at the end of the warm-up.
        optimizer: `adamw` is torch's; `adamw_8bit` holds its moments in 8 bits (bitsandbytes); `paged_adamw` and
            `paged_adamw_8bit` hold them in memory that moves between GPU and host as needed (bitsandbytes, GPU only).
        optimizer_states_on_cpu: moments live in host memory and visit the GPU one parameter at a time.
        gradient_dtype: dtype in which gradients are summed over micro-steps. `bfloat16` needs adapter.dtype=bfloat16,
            halves them, and rounds the sum after every micro-step.
        schedule: how the rate falls from the peak after the warm-up.
        min_lr_ratio: the rate at the end as a share of the peak.
        warmup_ratio: share of all steps spent rising from lr / warm-up steps to the peak.
        weight_decay: AdamW's pull towards zero.
        adam_beta1, adam_beta2: decay of AdamW's averages of gradients and of their squares.
        adam_eps: added to the root of the second average, so that tiny gradients are not blown up.
        max_grad_norm: gradients are scaled down to this norm; 0 turns clipping off (the norm is still checked).
        router_balance_coefficient: weight of the per-layer balance loss. The published config's 0.9 is a
            pre-training value and ruins a fine-tune: above 0.1 is refused unless forced.
        force_router_balance_coefficient: allow a coefficient above 0.1.
        router_balance_scope: over which tokens routing should be balanced: each `microbatch` by itself, or the whole
            optimiser `step` of all processes, which lets single rows specialise and costs one more forward pass.
        router_balance_target: `uniform`, every expert equally often; or `base`, as often as the base without the
            adapter takes it on the same tokens, so that learned specialisation stays. That is one more forward pass.
        router_z_loss_coefficient: weight of the mean squared log-sum-exp of the router's logits, which keeps them
            small; 0.001 is what was published for pre-training.
        activation_checkpointing: recompute each layer in the backward pass; less memory, more compute.
        activation_offload: keep what activation checkpointing saves (each layer's input) in the CPU's memory, copied
            beside the computation; less GPU memory for long rows. Only on a GPU.
        early_stop_patience: stop after this many evaluations without a better best metric. None: never.
        on_nonfinite: what becomes of a step whose loss or gradient is not finite on any process. `stop` ends the run
            before the update; `skip` leaves the step out, and ends the run after 10 of them in a row. Either way the
            step's rows go to `nonfinite/` in the run directory.
        halve_micro_batch_on_oom: when a micro-step does not fit into memory, take half as many rows in each and twice
            as many micro-steps from there on, on every process; the step stays the same.
        ignore_memory_estimate: start although the estimate says that the run does not fit into memory.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    optimizer_states_on_cpu: bool = False
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    router_balance_coefficient: float = 0.001
    force_router_balance_coefficient: bool = False
    router_balance_scope: Literal["microbatch", "step"] = "microbatch"
    router_balance_target: Literal["uniform", "base"] = "uniform"
    router_z_loss_coefficient: float = 0.0
    activation_checkpointing: bool = True
    activation_offload: bool = False
    early_stop_patience: int | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    halve_micro_batch_on_oom: bool = False
    ignore_memory_estimate: bool = False


@dataclass(frozen=True, kw_only=True)
class DistributedConfig(Strict):
    """Which processes take part; what runs is checked against what is asked for (docs/guide/distributed.md).

    Attributes:
        kind: `single` is one process. `ddp`: every process holds everything, and gradients are averaged. `zero1` and
            `zero2` (DeepSpeed) also deal out the optimiser's states, `zero2` the gradients too. `zero3` (DeepSpeed) and
            `fsdp2` (torch's `fully_shard`) deal out everything, the base's packed layers included.
        num_processes: processes in all, one a GPU. `finetune train` starts them, unless a launcher such as torchrun
            has done so.
        timeout_s: seconds without a step after which a process counts as hung: all are stopped, and what each was doing
            is printed.
    """

    kind: Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = "single"
    num_processes: int = 1
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Strict):
    """Where metrics go beside `metrics.jsonl`. A tracker that fails is reported once and never stops a run.

    Attributes:
        tracker: who draws curves: `wandb`, `tensorboard`, `mlflow` or `trackio`, each through Accelerate. Only figures
            and the configuration are sent. A package that is not installed is said once.
        project: under which name a tracker files the run.
        mode: `offline` writes the tracker's files into the run directory, whatever servers the environment names;
            `online` sends to the server that the tracker's own environment variables name (not for tensorboard).
        every_steps: optimiser steps between two progress lines when not on a terminal.
    """

    tracker: Literal["none", "wandb", "tensorboard", "mlflow", "trackio"] = "none"
    project: str = "gpt-oss-finetune"
    mode: Literal["offline", "online"] = "offline"
    every_steps: int = 10


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Strict):
    """What is measured before, while and after training.

    Attributes:
        every_steps: optimiser steps between two evaluations on the validation rows. None: only at the end.
        validation_examples: validation samples used each time (the same ones). None: all.
        test_examples: test samples scored before and after, stratified by answer, the same for every seed. None: all.
        labels: score each record's `answer` against the answers of test and training records by likelihood. `auto`:
            when every test record has an `answer` and there are at most 64 different ones.
        confidence: level of the intervals.
        routing_examples: samples (test, else validation, else training) on which it is measured before and after which
            experts are used, by channel and source, and how routing drifts from the base's. 0: not measured.
        max_routing_drift: stop (exit code 6) when, in any layer, a larger share of those samples' tokens than this
            goes to another set of experts than in the base. None: no limit.
    """

    every_steps: int | None = None
    validation_examples: int | None = None
    test_examples: int | None = None
    labels: Literal["auto", "always", "never"] = "auto"
    confidence: float = 0.95
    routing_examples: int = 64
    max_routing_drift: float | None = None


@dataclass(frozen=True, kw_only=True)
class SaveConfig(Strict):
    """Checkpoints for resuming.

    Attributes:
        every_steps: optimiser steps between two saves. None: only when a signal asks and at the end.
        keep: how many of the newest checkpoints stay on disk; the best one stays beside them.
        best_metric: the exported adapter is the one with the best value of this; `none` exports the last.
        background: a step waits only until adapter and optimiser are copied in host memory, and a thread writes them
            while training goes on. Off: it waits until they are on disk, and the copy is not needed.
    """

    every_steps: int | None = None
    keep: int = 2
    background: bool = True
    best_metric: Literal["none", "validation_loss"] = "none"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Strict):
    """What is done with the finished adapter.

    Attributes:
        read_back: load it with stock PEFT on transformers' dequantised base in a fresh process and compare logits.
            `auto`: when the base in the compute dtype, and half as much again, fits into half of the free memory;
            otherwise the run says that it did not.
        read_back_examples: test (or training) samples compared.
        calibration_tokens: tokens of training rows that a merge to MXFP4 is calibrated on. None: enough for four routed
            rows for each input dimension of each expert, with even routing (92,160 for 20b, 368,640 for 120b), and at
            least 32,768.
        survival_examples: test (else validation) rows on which a merge to MXFP4 is compared with base and adapter. 0:
            it is not, and nothing stops an export that lost the fine-tune.
        old_domain: named sources outside the fine-tune's domain, on which the same is compared; their loss says what a
            merge breaks elsewhere. Empty: not measured.
        min_gain_kept, max_gain_kept: share of the adapter's gain in test loss that a merge to MXFP4 must keep; outside
            the export exits with 6. More than all of it is noise that will not hold elsewhere.
        max_kl_share: KL(adapter || merge) may be at most this share of KL(adapter || base).
        share_examples: put the first few rows of the test data into the model cards that `finetune export` writes.
    """

    read_back: Literal["auto", "always", "never"] = "auto"
    read_back_examples: int = 4
    calibration_tokens: int | None = None
    survival_examples: int = 256
    old_domain: dict[str, SourceConfig] = field(default_factory=dict)
    min_gain_kept: float = 0.9
    max_gain_kept: float = 1.05
    max_kl_share: float = 0.5
    share_examples: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig(Strict):
    """A whole run.

    Attributes:
        name: directory name under `output_dir`. None: the recipe's name and the time.
        output_dir: where run directories are made.
        seed: the one seed: adapter initialisation, order of rows. Which rows are evaluated does not depend on it.
    """

    name: str | None = None
    output_dir: str = "runs"
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
