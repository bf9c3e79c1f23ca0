"""The frozen base: `open.open_base` is the one way to open it.

`hub` locates its files, `checkpoint` and `headers` validate them, `identity` verifies them. `build` fills
transformers' modules in the formats of `storage` and `nf4`, or one rank's part (`shards`). `experts` and `attention`
connect our kernels, `forward` runs packed sequences, `decoding` generates, `offload` saves activations on the host.
`usage` counts chosen experts, `noise` bounds rounding, `write` and `tiny` write checkpoints.
"""
