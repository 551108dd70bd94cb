"""Registration of the strategy's names with Lightning, without an import of ``lightning_async_localsgd``.

Lightning has no entry point for strategies, and reads the one for callbacks only after the lookup of the strategy's
name. PyTorch has an entry point: ``import torch`` calls every function of the group ``torch.backends``. Ours,
:func:`install`, waits for the import of ``lightning.pytorch.strategies`` or ``pytorch_lightning.strategies``, and then
adds our names to the registry of that package. The two packages have unrelated classes, so each gets its own class.

This module runs in every process that imports torch, even where Lightning is never used. It is therefore separate from
the package, needs only the standard library, and imports other modules only when they are needed. Any error in here
becomes one line in the log, never an exception out of ``import torch`` or ``import lightning``. What is registered is a
function that imports the strategy when its name is looked up, so a broken installation is reported at that time, with
the real error.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # Instead of typing.TYPE_CHECKING, which would need an import.
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
"""Names of the live strategy, and the start method that each one stands for."""

SIMULATED = "async_localsgd_simulated"
"""Name of the strategy that simulates a cluster in one process."""

SIMULATED_DESCRIPTION = "Asynchronous Local-SGD on a virtual cluster, in one process"
"""Description of the simulated strategy in Lightning's registry."""

DESCRIPTION = "Asynchronous Local-SGD, ranks started by `{}`"
"""Description of a live strategy in Lightning's registry, with a place for the start method."""

_PACKAGES = {
    "lightning.pytorch.strategies": "lightning_async_localsgd",
    "pytorch_lightning.strategies": "lightning_async_localsgd.pytorch_lightning",
}
"""Lightning's modules that have a registry, and our package with the strategy for each."""


def install() -> None:
    """Add the strategy's names to the registry of each of Lightning's packages, now or when the package is imported.

    May be called any number of times. Never raises, because ``import torch`` calls this function.
    """
    _log_errors(_install)


def _install() -> None:
    for name in _PACKAGES:
        if name in sys.modules:
            _register(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(strategies: ModuleType) -> None:
    registry = strategies.StrategyRegistry
    package = _PACKAGES[strategies.__name__]
    builder = _Builder(package, "AsyncLocalSGDStrategy")
    for name, start_method in START_METHODS.items():
        if name not in registry:
            registry.register(name, builder, description=DESCRIPTION.format(start_method), start_method=start_method)
    if SIMULATED not in registry:
        builder = _Builder(package, "SimulatedAsyncLocalSGDStrategy")
        registry.register(SIMULATED, builder, description=SIMULATED_DESCRIPTION)
    _set_rank_of_late_joiner()


def _set_rank_of_late_joiner() -> None:
    """Let no ``rank_zero_only`` function of the script run in a process that joins a running training.

    The server decides its rank later, when the trainer exists, but the rank is not 0.
    """
    from os import environ

    if environ.get("ASYNC_LOCALSGD_JOIN"):
        from lightning_utilities.core.rank_zero import rank_zero_only

        rank: Any = rank_zero_only
        if getattr(rank, "rank", 0) == 0:
            rank.rank = 1


class _Builder:
    """Creates the strategy when its name is looked up. Errors of its import are raised here, for the user to see."""

    def __init__(self, package: str, strategy: str) -> None:
        self._package = package
        self._strategy = strategy

    def __call__(self, **init_params: Any) -> Any:
        from importlib import import_module

        return getattr(import_module(self._package), self._strategy)(**init_params)


def _log_errors(function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except Exception as error:
        import logging

        logging.getLogger("lightning_async_localsgd").warning(
            "registering strategy='async_localsgd' with Lightning failed (%s: %s), so the Trainer will not find the "
            "strategy by its name; pass strategy=lightning_async_localsgd.AsyncLocalSGDStrategy() instead",
            type(error).__name__,
            error,
        )


class _Finder:
    """A finder on ``sys.meta_path`` that lets the other finders find the module, and registers after its execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _PACKAGES:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    _log_errors(_register_after_import, spec)
                    return spec
        return None


def _register_after_import(spec: ModuleSpec) -> None:
    name = spec.name
    loader: Any = spec.loader
    exec_module = loader.exec_module

    def exec_and_register(module: ModuleType) -> None:
        exec_module(module)
        # In a frozen application all modules may share one loader.
        if module.__name__ == name:
            loader.exec_module = exec_module
            _log_errors(_register, module)

    # Changed on the loader itself, rather than in a wrapper, so that other users of the module's loader (inspect,
    # pkgutil, importlib.resources) still get Lightning's own.
    loader.exec_module = exec_and_register
