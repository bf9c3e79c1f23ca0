"""Former place of `finetune.files.sha256_of`; to be folded into it."""

from __future__ import annotations

from finetune.files import sha256_of

__all__ = ["sha256_of"]
