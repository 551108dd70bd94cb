"""Processes of a run: how ranks meet, join a running training, and are restarted."""
