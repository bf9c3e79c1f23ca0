"""Survival of the fine-tune in a merge to MXFP4: counted in weights, and measured end to end on each variant."""
