"""Distributed engines, one per topology, behind one protocol: replicated, DeepSpeed ZeRO 1-3, and FSDP2."""
