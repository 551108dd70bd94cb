"""Asynchronous Local-SGD for Lightning: ``Trainer(strategy="async_localsgd")``.

Importing this package is cheap: it neither imports torch nor Lightning. What it exports is imported when it is first
used; the strategy's names are registered with Lightning as soon as both are there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.registration import register_when_lightning_is_imported

if TYPE_CHECKING:
    from lightning_async_localsgd.callback import AsyncLocalSGDCallback
    from lightning_async_localsgd.emulation import EmulatedDevices
    from lightning_async_localsgd.options import ExchangeOptions
    from lightning_async_localsgd.outer import DelayedNesterov, OuterOptimizer, TorchOptimizer
    from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy

__version__ = "0.1.0"

__all__ = [
    "AsyncLocalSGDCallback",
    "AsyncLocalSGDStrategy",
    "DelayedNesterov",
    "EmulatedDevices",
    "ExchangeOptions",
    "OuterOptimizer",
    "TorchOptimizer",
]

_HOME = {
    "AsyncLocalSGDCallback": "callback",
    "AsyncLocalSGDStrategy": "strategy",
    "DelayedNesterov": "outer",
    "EmulatedDevices": "emulation",
    "ExchangeOptions": "options",
    "OuterOptimizer": "outer",
    "TorchOptimizer": "outer",
}

register_when_lightning_is_imported()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
