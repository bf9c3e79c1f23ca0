"""Evaluation of base and adapter on the same examples, text generation, and the use of experts.

`run` is `finetune evaluate` end to end: `inputs` and `evalset` choose examples, `measure` scores them (with
`likelihood` and `labels`) and generates answers, `summary` turns scores into figures (with `statistics`, `prose` and
`contamination`). A training run uses the same measure and summary. `expert_scores` chooses experts to adapt, `usage`
reports their use, `harness` serves lm-evaluation-harness.
"""
