"""The layouts that are written: one module per target, `merged` for whole checkpoints."""
