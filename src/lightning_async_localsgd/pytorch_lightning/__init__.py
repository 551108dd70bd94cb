"""The same as :mod:`lightning_async_localsgd`, for projects that import ``pytorch_lightning``.

``Trainer(strategy="async_localsgd")`` of either package finds the right class by itself. Objects that are made by hand,
and class paths in configuration files, come from here::

    import pytorch_lightning as pl
    from lightning_async_localsgd.pytorch_lightning import AsyncLocalSGDStrategy

    trainer = pl.Trainer(strategy=AsyncLocalSGDStrategy(local_steps=50), accelerator="cpu", devices=4, max_steps=1000)

There is one implementation; :mod:`lightning_async_localsgd.twin` says how it serves both. Everything that does not
depend on Lightning, such as the outer optimizers, is the very same object here and there. Type checkers see what is
exported here as ``Any``: they would take it for the class of the other package.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_async_localsgd import HOMES, twin

__all__ = sorted(HOMES)

twin.install()


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(twin.counterpart(f"{twin.PACKAGE}.{HOMES[name]}")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
