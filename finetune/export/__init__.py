"""Exports: an adapter for a serving stack (`adapters`), or its base with the adapter merged in (`targets.merged`).

A merge is planned (`plan`), written (`execute`, `targets.gguf`), verified in fresh processes (`verify`, `children`) and
measured (`survival`); `record` and `card` are its export.json and README.md. Also `finetune adapter`: show, import and
combine.
"""
