"""Numerical kernels on tensors, independent of transformers: experts with LoRA, attention with sinks, the loss head.

`experts` and `attention` are the references in plain PyTorch, the specification; `experts_fused` (with
`experts_triton`) and `flash` are faster equals, and `choice` decides between them. `dispatch` sorts tokens by expert,
`grouped` multiplies them, `loss_head` computes log-probabilities in chunks, `cache` has keys and values for generation.
"""
