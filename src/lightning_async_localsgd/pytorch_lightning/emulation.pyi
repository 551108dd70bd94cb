"""The module ``emulation`` for ``pytorch_lightning``."""

from lightning_async_localsgd.pytorch_lightning import EmulatedDevices as EmulatedDevices
