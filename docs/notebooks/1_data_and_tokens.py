"""Notebook 1: from records to packed tokens. No model needed."""

# %% [markdown]
# # 1. Data and tokens
# From a record to tokens, of which some are trained and the rest are context.
# Runs in seconds, without a model. Open it in an editor that knows `# %%` cells, or run it as a program.

# %%
import json
import tempfile
from pathlib import Path

import numpy as np

from finetune.config.compose import compose
from finetune.data.dataset import describe, load_split
from finetune.data.packing import pack, packing_efficiency
from finetune.data.preview import as_text

work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Three conversations
# One record per line. `thinking` goes to the analysis channel; `answer` is a label that evaluation can score.

# %%
records = [
    {
        "messages": [
            {"role": "system", "content": "Answer with one word."},
            {"role": "user", "content": f"Is {number} even?"},
            {"role": "assistant", "thinking": f"{number} ends in {number % 10}.", "content": answer},
        ],
        "answer": answer,
    }
    for number, answer in ((4, "yes"), (7, "no"), (12, "yes"))
]
(work / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

# %% [markdown]
# ## A recipe
# A recipe lists its differences from the defaults. Here: the path of the data, and no token cache.

# %%
recipe = work / "mine.yaml"
recipe.write_text(f"""# @package _global_
defaults:
  - override /model: tiny
data:
  train: {{mine: {{path: {work / "records.jsonl"}}}}}
  cache: false
""")
data = compose(str(recipe)).config.data
train = load_split(data, "train")
print(describe(train))

# %% [markdown]
# ## Trained tokens
# Brackets mark them, with their channel. Everything that the model writes is trained, end tokens included.

# %%
print(as_text(train.examples[0], colour=False))
example = train.examples[0]
print(f"{example.num_trained_tokens} of {len(example.ids)} tokens are trained")

# %% [markdown]
# Thinking with weight 0 is not trained. It stays in the example, as context for the answer.

# %%
without = compose(str(recipe), ["data.loss.analysis=0"]).config.data
answer_only = load_split(without, "train").examples[0]
print(f"with data.loss.analysis=0: {answer_only.num_trained_tokens} of {len(answer_only.ids)}")
assert answer_only.num_trained_tokens < example.num_trained_tokens
assert np.array_equal(answer_only.ids, example.ids)

# %% [markdown]
# ## Packing
# Several examples share a sequence; none attends to another.

# %%
lengths = [len(one.ids) for one in train.examples] * 10
packed = pack(lengths, 512, np.random.default_rng(0))
print(f"{len(lengths)} examples in {len(packed)} sequences, {packing_efficiency(lengths, packed, 512):.0%} filled")
assert sorted(number for sequence in packed for number in sequence) == list(range(len(lengths)))
