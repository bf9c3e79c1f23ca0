"""LoRA adapters: planned sites, live modules, attaching, files, the gradient audit and the read-back.

sites -> lora (modules) -> layout, provenance, store (the adapter directory), compact -> attach; audit, read_back.
"""
