"""The strategy that simulates a cluster of virtual workers in one process."""
