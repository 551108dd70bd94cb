"""The names of :mod:`lightning_async_localsgd` for projects that import ``pytorch_lightning``.

``Trainer(strategy="async_localsgd")`` of both packages finds the right class by itself. Import objects that you create
yourself, and class paths in configuration files, from here::

    import pytorch_lightning as pl
    from lightning_async_localsgd.pytorch_lightning import AsyncLocalSGDStrategy

    trainer = pl.Trainer(strategy=AsyncLocalSGDStrategy(local_steps=50), accelerator="cpu", devices=4, max_steps=1000)

Both packages share one implementation, see :mod:`._mirror`. Objects that do not depend on Lightning, such as the outer
optimizers, are the same in both. Type checkers read the stubs beside this file, because they cannot follow the mirror.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_async_localsgd import HOMES
from lightning_async_localsgd.pytorch_lightning._mirror import PACKAGE, counterpart, install

__all__ = sorted(HOMES)

install()


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(counterpart(f"{PACKAGE}.{HOMES[name]}")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
