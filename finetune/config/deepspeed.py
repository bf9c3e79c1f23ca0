"""DeepSpeed's settings, worked out from a recipe: shown by `config show` and a dry run, stored in the run directory."""

from __future__ import annotations

import json
from typing import Any

from finetune.config.distributed_rules import DEEPSPEED
from finetune.config.schema import RunConfig

NEVER = 10**9


def deepspeed_settings(config: RunConfig) -> dict[str, Any] | None:
    """What DeepSpeed is given, None if the recipe does not use it.

    DeepSpeed sees the adapter alone: the base's tensors are no parameters to it. The optimiser is torch's AdamW, as
    with every other kind, and clipping and accumulation are the recipe's.
    """
    if config.distributed.kind not in DEEPSPEED:
        return None
    trainer = config.trainer
    stage = int(config.distributed.kind.removeprefix("zero"))
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # deal out small factors too: the adapter is made of them
    return {
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
    }


def deepspeed_lines(config: RunConfig) -> list[str]:
    """The settings for a person to read; nothing if the recipe does not use DeepSpeed."""
    settings = deepspeed_settings(config)
    return ["DeepSpeed is given:", *json.dumps(settings, indent=2).splitlines()] if settings else []
