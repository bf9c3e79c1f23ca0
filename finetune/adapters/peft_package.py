"""What is used of PEFT at run time: its configuration class, so that ours is written with every field of its own."""

from __future__ import annotations

from finetune.model.nf4 import without_kernel_advice

without_kernel_advice()  # PEFT imports bitsandbytes where that is installed

from peft import LoraConfig  # noqa: E402 - at the top it would come before the line above

__all__ = ["LoraConfig"]
