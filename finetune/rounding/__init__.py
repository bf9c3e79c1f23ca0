"""Rounding experts plus their update back to MXFP4: to nearest, stochastically, or compensated.

`run` rounds a base layer by layer with compensation, `compensate` solves one chunk of experts, `calibration` chooses
the tokens it minimises the error on; `nearest` and `merge` are the arithmetic of the other merges, `grid` the number
format as real numbers.
"""
