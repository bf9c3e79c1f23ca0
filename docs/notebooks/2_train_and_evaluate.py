"""Notebook 2: a whole run on a tiny random base: check, train, evaluate, report."""

# %% [markdown]
# # 2. Train and evaluate
# A whole run on a tiny random base, on a CPU. The commands are those of the terminal: `main([...])` is `finetune ...`.

# %%
import json
import tempfile
from pathlib import Path

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

# %% [markdown]
# ## Dry run
# A dry run checks everything that needs no model, and shows the sites that will be adapted.

# %%
assert main(["train", str(recipe), "--dry-run"]) == 0

# %% [markdown]
# ## Train
# Sites are counted before the first step; gradients are audited in the first two.

# %%
assert main(["train", str(recipe), "name=first"]) == 0
run = work / "first"
print(*sorted(path.name for path in run.iterdir()))

# %% [markdown]
# ## Results
# metrics.jsonl has one line per step; evaluation.json has the test figures before and after, with intervals.

# %%
for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
    if line["kind"] in ("step", "evaluation"):
        print(line["step"], line["kind"], f"{line.get('loss', line.get('validation_loss')):.3f}")
evaluation = json.loads((run / "evaluation.json").read_text())
loss = evaluation["suites"][0]["loss"]
print(f"test loss {loss['base']['value']:.3f} -> {loss['adapter']['value']:.3f}")
assert loss["adapter"]["value"] < loss["base"]["value"]

# %% [markdown]
# ## The report
# One page, for a run that is finished, still running, or interrupted.

# %%
assert main(["report", str(run)]) == 0
print((run / "report.md").read_text()[:600])
