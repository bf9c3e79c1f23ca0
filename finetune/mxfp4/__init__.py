"""MXFP4, the number format of the published experts: packing, dequantising and quantising."""
