"""What a merge to MXFP4 keeps of the fine-tune: counted in weights, and measured end to end on each variant."""
