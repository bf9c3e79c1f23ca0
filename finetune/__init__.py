"""Fine-tune gpt-oss with LoRA on attention and on every expert, over native MXFP4 weights."""

__version__ = "0.2.0"
