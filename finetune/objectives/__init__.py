"""Training objectives: the protocol (`base`), supervised fine-tuning (`sft`), and the router's terms (`router`).

An objective says what one optimiser step minimises. It is one file here and one dataclass in
`config/schema_training`; the step (`train/step.py`) sums its terms over micro-batches and ranks, and logs them by name.
"""
