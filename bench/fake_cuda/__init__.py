"""A GPU that computes nothing: the real optimiser step on fake CUDA tensors, counted operation by operation.

Shapes, dtypes and devices are those of a real run, so launches, bytes, arithmetic, host waits and allocated memory are
too; only values are missing. Nothing of it is used by the product.
"""
