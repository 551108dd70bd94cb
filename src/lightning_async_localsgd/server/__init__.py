"""Rank 0's server: one thread owns the global model and decides who takes part and what is merged."""
