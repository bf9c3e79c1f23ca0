"""The published Jinja template itself, run by transformers: an oracle for tests, where the file is at hand."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template

SHA256_START = "a4c9919c"
DATE = "2025-06-28"


def find_template() -> Path | None:
    """The file that GPTOSS_TEMPLATE names, or an installed trl's copy; None if there is neither."""
    if named := os.environ.get("GPTOSS_TEMPLATE"):
        return Path(named)
    trl = importlib.util.find_spec("trl")
    if trl is None or trl.origin is None:
        return None
    return Path(trl.origin).parent / "chat_templates" / "gptoss.jinja"


class Template:
    """Renders raw records.

    Args:
        path: the published file; another one is refused.
    """

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        assert hashlib.sha256(content).hexdigest().startswith(SHA256_START), f"{path} is another template"
        self._compiled = _compile_jinja_template(content.decode())

    def training(self, record: dict[str, Any]) -> str:
        return self._render(record, record["messages"], is_prompt=False)

    def prompt(self, record: dict[str, Any]) -> str:
        messages = list(record["messages"])
        while messages[-1]["role"] == "assistant":
            messages.pop()
        return self._render(record, messages, is_prompt=True)

    def _render(self, record: dict[str, Any], messages: list[dict[str, Any]], *, is_prompt: bool) -> str:
        given = {
            key: record[key]
            for key in ("tools", "builtin_tools", "model_identity", "reasoning_effort")
            if key in record
        }
        date = record.get("conversation_date", DATE)
        text: str = self._compiled.render(
            messages=messages, add_generation_prompt=is_prompt, strftime_now=lambda _: date, **given
        )
        return text
