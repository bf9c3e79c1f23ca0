"""Rows of the data in a model card: only where the recipe says that they may leave (`export.share_examples`)."""

from __future__ import annotations

from finetune.config.schema import RunConfig
from finetune.data.dataset import load_split
from finetune.errors import FinetuneError

NUM_EXAMPLES = 3


def examples_section(config: RunConfig | None) -> str:
    """The first test (or training) conversations as a section of a card; "" unless the recipe allows it.

    Args:
        config: the run's, or None if there is no run.
    """
    if config is None or not config.export.share_examples:
        return ""
    try:
        split = load_split(config.data, "test" if config.data.test else "train")
    except FinetuneError as error:
        return f"## Examples\n\nThe data could not be read when this card was written: {error.what}."
    parts = []
    for record in split.records[:NUM_EXAMPLES]:
        texts: list[tuple[str, str]] = [(message.role, message.content) for message in record.messages]
        if record.conversation.text is not None:
            texts.append(("text", record.conversation.text))
        parts.append("\n".join(f"{role}: {text}" for role, text in texts))
    # Indented text is shown as it is: nothing in the data becomes markup.
    blocks = ["\n".join(f"    {line}" for line in part.splitlines()) for part in parts]
    return f"## Examples\n\nThe first rows of the {split.name} data, as they are.\n\n" + "\n\n---\n\n".join(blocks)
