"""Notebook 1: what a record becomes before a model sees it. No model needed."""

# %% [markdown]
# # 1. Data and tokens
# What a record becomes before a model sees it: tokens, of which some are trained and the rest is context.
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
# One a line. `thinking` goes to the analysis channel; `answer` is a label that evaluation can score.

# %%
rows = [
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
(work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% [markdown]
# ## A recipe
# A recipe says what differs from the defaults. Here: where the data is, and that nothing is kept in the cache.

# %%
recipe = work / "mine.yaml"
recipe.write_text(f"""# @package _global_
defaults:
  - override /model: tiny
data:
  train: {{rows: {{path: {work / "rows.jsonl"}}}}}
  cache: false
""")
data = compose(str(recipe)).config.data
train = load_split(data, "train")
print(describe(train))

# %% [markdown]
# ## What is trained
# Brackets mark it, with its channel. Everything that the model itself writes is trained, end tokens included.

# %%
print(as_text(train.examples[0], colour=False))
sample = train.examples[0]
print(f"{sample.num_trained_tokens} of {len(sample.ids)} tokens are trained")

# %% [markdown]
# Thinking that is not to be learnt gets weight 0. It stays in the row, as context for the answer.

# %%
without = compose(str(recipe), ["data.loss.analysis=0"]).config.data
answer_only = load_split(without, "train").examples[0]
print(f"with data.loss.analysis=0: {answer_only.num_trained_tokens} of {len(answer_only.ids)}")
assert answer_only.num_trained_tokens < sample.num_trained_tokens
assert np.array_equal(answer_only.ids, sample.ids)

# %% [markdown]
# ## Packing
# Several samples share a row; none sees another.

# %%
lengths = [len(one.ids) for one in train.examples] * 10
packed = pack(lengths, 512, np.random.default_rng(0))
print(f"{len(lengths)} samples in {len(packed)} rows, {packing_efficiency(lengths, packed, 512):.0%} filled")
assert sorted(number for row in packed for number in row) == list(range(len(lengths)))
