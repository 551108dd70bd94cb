"""Checkpoints of rank 0 and the optimizer states of the other workers."""
