"""Makes the strategy's names known to Lightning without anybody importing ``lightning_async_localsgd``.

Lightning has no entry point for strategies, and the one for callbacks is read only after the strategy's name was
looked up. PyTorch has one: ``import torch`` calls every function of the entry point group ``torch.backends``. Ours,
:func:`install`, waits for ``lightning.pytorch.strategies`` or ``pytorch_lightning.strategies`` to be imported and then
adds our names to that one's registry. The two packages have unrelated classes, so each gets a class of its own.

This runs in every process that imports torch, on machines where Lightning may not even be used. So it is a module of
its own that needs nothing but the standard library, it imports nothing before it is needed, and whatever goes wrong
in it becomes one logged line and never an exception out of ``import torch`` or ``import lightning``. What is
registered is a function that imports the real strategy when somebody asks for it by name: a broken installation is
reported there and then, with the real error.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, which would cost an import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

START_METHODS = {
    "async_localsgd": "popen",
    "async_localsgd_spawn": "spawn",
    "async_localsgd_fork": "fork",
    "async_localsgd_notebook": "fork",
}
"""How the ranks of one host are started under each name of the live strategy."""

SIMULATED = "async_localsgd_simulated"
"""The name of the strategy that plays a cluster in one process."""

SIMULATED_DESCRIPTION = "Asynchronous Local-SGD on a virtual cluster, in one process"
"""What Lightning's registry shows for it."""

DESCRIPTION = "Asynchronous Local-SGD, ranks started by `{}`"
"""What Lightning's registry shows for another name."""

_HOMES = {
    "lightning.pytorch.strategies": "lightning_async_localsgd",
    "pytorch_lightning.strategies": "lightning_async_localsgd.pytorch_lightning",
}
"""Lightning's modules that have a registry, and our package with the strategy that belongs there."""


def install() -> None:
    """Adds the names to the registries of both of Lightning's packages: now, or as soon as one is imported.

    May be called any number of times. Never raises: this is what ``import torch`` calls.
    """
    _guarded(_install)


def _install() -> None:
    for name in _HOMES:
        if name in sys.modules:
            _register(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(strategies: ModuleType) -> None:
    registry = strategies.StrategyRegistry
    home = _HOMES[strategies.__name__]
    builder = _Builder(home, "AsyncLocalSGDStrategy")
    for name, start_method in START_METHODS.items():
        if name not in registry:
            registry.register(name, builder, description=DESCRIPTION.format(start_method), start_method=start_method)
    if SIMULATED not in registry:
        builder = _Builder(home, "SimulatedAsyncLocalSGDStrategy")
        registry.register(SIMULATED, builder, description=SIMULATED_DESCRIPTION)


class _Builder:
    """Makes the strategy when Lightning's registry asks for it; here an import error is the user's to see."""

    def __init__(self, package: str, strategy: str) -> None:
        self._package = package
        self._strategy = strategy

    def __call__(self, **init_params: Any) -> Any:
        from importlib import import_module

        return getattr(import_module(self._package), self._strategy)(**init_params)


def _guarded(function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except Exception as error:
        import logging

        logging.getLogger("lightning_async_localsgd").warning(
            "Trainer(strategy='async_localsgd') will not be found by its name, because registering it with Lightning "
            "failed (%s: %s); pass strategy=lightning_async_localsgd.AsyncLocalSGDStrategy() instead",
            type(error).__name__,
            error,
        )


class _Finder:
    """A finder on ``sys.meta_path`` that leaves the work to the others and adds one call after the module's body."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _HOMES:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    _guarded(_register_after_import, spec)
                    return spec
        return None


def _register_after_import(spec: ModuleSpec) -> None:
    name = spec.name
    loader: Any = spec.loader
    exec_module = loader.exec_module

    def exec_and_register(module: ModuleType) -> None:
        exec_module(module)
        # A frozen application may have one loader for all modules.
        if module.__name__ == name:
            loader.exec_module = exec_module
            _guarded(_register, module)

    # On the loader that was found, rather than a loader around it, so that everything else that asks for the module's
    # loader (inspect, pkgutil, importlib.resources) still meets Lightning's own.
    loader.exec_module = exec_and_register
