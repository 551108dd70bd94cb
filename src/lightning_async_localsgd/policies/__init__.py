"""Decisions in numbers: local steps, grace windows, budget, data leases. No thread, no socket and no clock."""
