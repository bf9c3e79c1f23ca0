"""`python -m finetune`: the same as the `finetune` command, for launchers that start modules."""

from __future__ import annotations

from finetune.cli.main import entry

entry()
