"""Slow machines on a fast one, see :class:`EmulatedDevices`."""

from __future__ import annotations

from lightning_async_localsgd import EmulatedDevices

__all__ = ["EmulatedDevices"]
