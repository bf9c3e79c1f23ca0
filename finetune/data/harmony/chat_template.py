"""Write `chat_template.jinja`: the text form of what `data.convention` trains, for programs that serve a model.

transformers, llama.cpp and mlx-lm render conversations with it. The template beside this file is filled with the
defaults that training uses: convention, date, effort, identity and openai-harmony's text of the builtin tools.
"""

from __future__ import annotations

import json
from pathlib import Path

from finetune.config.schema import DataConfig
from finetune.data.harmony.encode import HARMONY_IDENTITY, builtin_tool_text, writes_constrain

TEMPLATE_FILE = "chat_template.jinja"
"""Its name in a checkpoint directory."""


def chat_template(config: DataConfig | None = None) -> str:
    """Fill the template.

    Args:
        config: of the training; None: the defaults.

    Returns:
        Jinja source. Rendered with a record's `messages`, `tools` and other keys it gives the text of `render_prompt`
        (`add_generation_prompt`) or `render_example` of these defaults. Arguments and results that are JSON text are
        written as they stand. A tokenizer reads control tokens that the messages spell as control tokens, which
        training never does.
    """
    config = config or DataConfig(train={})
    values = {
        "convention": config.convention,
        "constrained": writes_constrain(config),
        "keeps_earlier_thinking": config.earlier_thinking == "keep",
        "date": config.conversation_date,
        "effort": config.reasoning_effort,
        "identity": config.model_identity or HARMONY_IDENTITY,
        "builtin_texts": {"browser": builtin_tool_text("browser"), "python": builtin_tool_text("python")},
    }
    text = Path(__file__).with_name(TEMPLATE_FILE).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", json.dumps(value, ensure_ascii=False))  # JSON's literals are Jinja's too
    return text
