"""Every key that a recipe may set, as frozen dataclasses: the one definition for composing, checking and the docs.

Imports neither torch nor Hydra, so that `finetune --help` and `finetune config` stay quick. docs/design.md argues for
the defaults; a recipe states only what differs. Names contain their units; `None` means "not set", and the docstring
says what follows from that. Ranges are part of the types (`Annotated[int, Ge(1)]`); conditions on several keys are in
rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from finetune.config.fields import Strict
from finetune.config.schema_data import DataConfig as DataConfig
from finetune.config.schema_data import DataForm as DataForm
from finetune.config.schema_data import LossConfig as LossConfig
from finetune.config.schema_data import ReasoningEffortName as ReasoningEffortName
from finetune.config.schema_data import SourceConfig as SourceConfig
from finetune.config.schema_data import ThinkTags as ThinkTags
from finetune.config.schema_data import ValidationSplitConfig as ValidationSplitConfig
from finetune.config.schema_objective import CpoConfig as CpoConfig
from finetune.config.schema_objective import DpoConfig as DpoConfig
from finetune.config.schema_objective import ObjectiveConfig as ObjectiveConfig
from finetune.config.schema_objective import OrpoConfig as OrpoConfig
from finetune.config.schema_objective import PreferenceConfig as PreferenceConfig
from finetune.config.schema_objective import SftConfig as SftConfig
from finetune.config.schema_objective import SimpoConfig as SimpoConfig
from finetune.config.schema_training import AdapterConfig as AdapterConfig
from finetune.config.schema_training import AttentionAdapterConfig as AttentionAdapterConfig
from finetune.config.schema_training import AttentionTarget as AttentionTarget
from finetune.config.schema_training import ExpertAdapterConfig as ExpertAdapterConfig
from finetune.config.schema_training import RouterAdapterConfig as RouterAdapterConfig
from finetune.config.schema_training import TrainerConfig as TrainerConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Strict):
    """The frozen base.

    Attributes:
        path: a checkpoint directory in the published layout, or a hub name such as `openai/gpt-oss-20b`.
        revision: branch, tag or commit of a hub name; the commit it resolves to is recorded. None: the hub's default.
        device: `auto` takes the first GPU if there is one.
        compute_dtype: dtype of activations and of every base tensor that is not packed. `auto`: bfloat16 on a GPU,
            float32 on a CPU.
        expert_storage: storage format of expert weights, checked against what was loaded. `mxfp4` as published, 4.25
            bits per weight; `nf4` quantised once more to bitsandbytes' NF4, 4.5 bits; `bfloat16` the values of `mxfp4`
            in 16 bits.
        attention_storage: storage format of the frozen q, k, v and o weights: `compute` is the compute dtype, `nf4`
            quantises to bitsandbytes' NF4. With `nf4` in either, the base differs from the checkpoint, and the adapter
            records it.
        embedding_on_cpu: keep the input embedding in host memory; only the rows of a micro-batch's tokens are copied.
        expert_kernel: implementation of the expert block. `triton` is the fused kernel for NVIDIA GPUs (Ampere and
            newer), `reference` plain PyTorch; same result up to rounding. `auto`: Triton where it runs and agrees with
            the reference at start-up, else the reference; the choice is printed with its reason.
        experts_per_chunk: number of experts dequantised at a time; scratch memory grows with it.
        attention_kernel: implementation of attention. `flash` is torch's own flash kernel with sinks, `reference` plain
            PyTorch; same result up to rounding. `auto`: flash where it runs and agrees with the reference at start-up
            (a GPU from Ampere on, or a CPU), else the reference; the choice is printed with its reason.
        identity: the base's identity as an earlier run printed it, or its beginning; another base is refused, so that
            a flipped bit in a checkpoint without `checksums.json` is found. None: not compared.
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
    experts_per_chunk: Annotated[int, Ge(1)] = 16
    attention_kernel: Literal["auto", "flash", "reference"] = "auto"
    identity: str | None = None
    verify_checksums: bool = True


@dataclass(frozen=True, kw_only=True)
class DistributedConfig(Strict):
    """Ranks and what they share, checked against the processes that really run (docs/guide/distributed.md).

    Attributes:
        kind: `single` is one process. `ddp`: every rank has base and adapter, and gradients are averaged. `zero1` and
            `zero2` (DeepSpeed) also shard the optimiser states, `zero2` the gradients too. `zero3` (DeepSpeed) and
            `fsdp2` (torch's `fully_shard`) shard everything, the base's packed layers included.
        num_processes: the world size, one process per GPU. `finetune train` starts the processes, unless a launcher
            such as torchrun has done so.
        timeout_s: seconds without a step after which a rank counts as hung: all ranks are stopped, and what each was
            doing is printed.
    """

    kind: Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = "single"
    num_processes: Annotated[int, Ge(1)] = 1
    timeout_s: Annotated[float, Gt(0)] = 600.0


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Strict):
    """Trackers beside `metrics.jsonl`, and progress lines. A tracker that fails is reported once and never stops a run.

    Attributes:
        tracker: `wandb`, `tensorboard`, `mlflow` or `trackio`, each through Accelerate. Only metrics and the
            configuration are sent. A package that is not installed is reported once.
        project: the tracker's project name.
        mode: `offline` writes the tracker's files into the run directory, whatever servers the environment names;
            `online` sends to the server that the tracker's own environment variables name (not for tensorboard).
        every_steps: optimiser steps between two progress lines when not on a terminal.
    """

    tracker: Literal["none", "wandb", "tensorboard", "mlflow", "trackio"] = "none"
    project: str = "gpt-oss-finetune"
    mode: Literal["offline", "online"] = "offline"
    every_steps: Annotated[int, Ge(1)] = 10


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Strict):
    """Measurements before, during and after training.

    Attributes:
        every_steps: optimiser steps between two evaluations on the validation examples. None: only at the end.
        validation_examples: validation examples used each time (the same ones). None: all.
        test_examples: test examples scored before and after, stratified by answer, the same for every seed. None: all.
        labels: score each record's `answer` against the answers of test and training records by likelihood. `auto`:
            if every test record has an `answer` and there are at most 64 different ones.
        confidence: level of the intervals.
        routing_examples: examples (test, else validation, else training) on which the use of experts is measured before
            and after, by channel and source, and the drift of routing from the base's. 0: not measured.
        max_routing_drift: stop (exit code 6) if, in any layer, a larger share of those examples' tokens than this
            is routed to another set of experts than in the base. None: no limit.
    """

    every_steps: Annotated[int, Ge(1)] | None = None
    validation_examples: Annotated[int, Ge(1)] | None = None
    test_examples: Annotated[int, Ge(1)] | None = None
    labels: Literal["auto", "always", "never"] = "auto"
    confidence: Annotated[float, Gt(0), Lt(1)] = 0.95
    routing_examples: Annotated[int, Ge(0)] = 64
    max_routing_drift: Annotated[float, Gt(0), Le(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class SaveConfig(Strict):
    """Checkpoints for resuming.

    Attributes:
        every_steps: optimiser steps between two saves. None: only on a signal and at the end.
        keep: number of newest checkpoints kept on disk; the best one is kept beside them.
        best_metric: the exported adapter is the one with the best value of this; `none` exports the last.
        background: a step waits only until adapter and optimiser are copied in host memory, and a thread writes them
            during the next steps. Off: it waits until they are on disk, and the copy is not needed.
    """

    every_steps: Annotated[int, Ge(1)] | None = None
    keep: Annotated[int, Ge(1)] = 2
    background: bool = True
    best_metric: Literal["none", "validation_loss"] = "none"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Strict):
    """Checks of the finished adapter and of its exports.

    Attributes:
        read_back: load it with stock PEFT on transformers' dequantised base in a fresh process and compare logits.
            `auto`: if the base in the compute dtype, and half as much again, fits into half of the free memory;
            otherwise the run logs that it was not checked.
        read_back_examples: number of test (or training) examples compared.
        calibration_tokens: tokens of training examples on which a merge to MXFP4 is calibrated. None: enough for four
            routed tokens per input dimension of each expert, with even routing (92,160 for 20b, 368,640 for 120b), and
            at least 32,768.
        survival_examples: test (else validation) examples on which a merge to MXFP4 is compared with base and adapter.
            0: not compared, and nothing stops an export that lost the fine-tune.
        survival_labels: also score the labels of these examples in every variant: as many passes as there are labels.
        old_domain: named sources outside the fine-tune's domain, compared in the same way; their loss shows what a
            merge breaks elsewhere. Empty: not measured.
        min_gain_kept, max_gain_kept: share of the adapter's gain in test loss that a merge to MXFP4 must keep; outside
            of it the export exits with 6. More than the whole gain is noise that will not hold elsewhere.
        max_kl_share: KL(adapter || merge) may be at most this share of KL(adapter || base).
        share_examples: put the first few test records into the model cards that `finetune export` writes.
    """

    read_back: Literal["auto", "always", "never"] = "auto"
    read_back_examples: Annotated[int, Ge(1)] = 4
    calibration_tokens: Annotated[int, Ge(1)] | None = None
    survival_examples: Annotated[int, Ge(0)] = 256
    survival_labels: bool = False
    old_domain: dict[str, SourceConfig] = field(default_factory=dict)
    min_gain_kept: Annotated[float, Ge(0), Le(1)] = 0.9
    max_gain_kept: Annotated[float, Ge(1)] = 1.05
    max_kl_share: Annotated[float, Ge(0), Le(1)] = 0.5
    share_examples: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig(Strict):
    """A whole run.

    Attributes:
        name: directory name under `output_dir`. None: the recipe's name and the time.
        output_dir: where run directories are made.
        seed: the one seed, of adapter initialisation and order of examples. Evaluated examples do not depend on it.
    """

    name: str | None = None
    output_dir: str = "runs"
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    objective: ObjectiveConfig = field(default_factory=SftConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        """Give `trainer.learning_rate` the objective's default where it is None."""
        if self.trainer.learning_rate is None:
            trainer = replace(self.trainer, learning_rate=self.objective.default_learning_rate)
            object.__setattr__(self, "trainer", trainer)
