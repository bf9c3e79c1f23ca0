"""Notebook 3: an export, read by stock PEFT on transformers' own gpt-oss."""

# %% [markdown]
# # 3. Export and read back
# An adapter is useful if third-party code can load it. Here stock PEFT does, on transformers' own gpt-oss.

# %%
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Mxfp4Config

from finetune.cli.main import main
from finetune.model.tiny import write_tiny_base

work = Path(tempfile.mkdtemp())
base = work / "base"
write_tiny_base(base, seed=0, kind="random")  # random: enough for the workflow; it can learn only a little
recipe = work / "small.yaml"
recipe.write_text(f"""# @package _global_
defaults:
  - override /model: tiny
  - override /data: own
model: {{path: {base}}}
output_dir: {work}
data:
  train: {{clauses: {{path: shipped://legal/cuad_clause_type.jsonl.gz, where: {{split: train}}, limit: 24}}}}
  validation: {{clauses: {{path: shipped://legal/cuad_clause_type.jsonl.gz, where: {{split: val}}, limit: 4}}}}
  test: {{clauses: {{path: shipped://legal/cuad_clause_type.jsonl.gz, where: {{split: test}}, limit: 6}}}}
  max_length: 700
  cache: false
adapter: {{attention: {{rank: 4}}, experts: {{rank: 4}}}}
trainer: {{max_steps: 6, gradient_accumulation_steps: 1, learning_rate: 1.0e-2}}
evaluate: {{every_steps: 3, labels: never}}
export: {{read_back: never}}
""")
assert main(["train", str(recipe), "name=first", "evaluate.test_examples=1"]) == 0
run = work / "first"

# %% [markdown]
# ## Contents of the adapter
# The norm of each kind of site; an expert that no token was routed to has none.

# %%
assert main(["adapter", "show", str(run)]) == 0

# %% [markdown]
# ## Export
# Written under a temporary name, read back by a process that shares no code with the writer, then renamed.

# %%
assert main(["export", str(run), "--to", "peft", "--out", str(work / "peft")]) == 0
print(*sorted(path.name for path in (work / "peft").iterdir()))

# %% [markdown]
# ## Read it with stock PEFT
# None of this project's code from here on. The same prompt with and without the adapter: a difference of 0 would mean
# that it was loaded and not applied.

# %%
model = AutoModelForCausalLM.from_pretrained(
    base, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32, attn_implementation="eager"
)
model = PeftModel.from_pretrained(model, work / "peft").eval()
prompt = torch.arange(1000, 1032)[None]
with torch.no_grad():
    adapted = model(prompt).logits
    with model.disable_adapter():
        plain = model(prompt).logits
difference = (adapted - plain).abs().max().item()
print(f"the adapter moves logits by up to {difference:.3f}")
assert difference > 0.01
