"""The names under which ``Trainer(strategy=...)`` finds the strategy, and how Lightning comes to know them.

Two ways lead to the same names. With the package installed, ``import torch`` finds the entry point that
:mod:`lightning_async_localsgd_autoload` describes. Where that is switched off (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``) or
the package is only on the path, ``import lightning_async_localsgd`` does the same. Both serve ``lightning.pytorch`` and
``pytorch_lightning``: each finds the class that is made for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_async_localsgd_autoload import DESCRIPTION, SIMULATED, SIMULATED_DESCRIPTION, START_METHODS, install

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NAMES", "register_names", "register_simulated", "register_when_lightning_is_imported"]

NAMES = (*START_METHODS, SIMULATED)
"""Every name that ``Trainer(strategy=...)`` takes."""

register_when_lightning_is_imported = install


def register_simulated(registry: Any, strategy: Callable[..., Any]) -> None:
    """Registers ``strategy`` as the one that plays a cluster, in place of what may be registered there.

    Args:
        registry: Lightning's ``StrategyRegistry``, or another one with the same ``register`` method.
        strategy: called when the name is asked for; usually the strategy's class.

    """
    registry.register(SIMULATED, strategy, description=SIMULATED_DESCRIPTION, override=True)


def register_names(registry: Any, strategy: Callable[..., Any]) -> None:
    """Registers ``strategy`` under all names of the live strategy, in place of what may be registered there.

    Args:
        registry: Lightning's ``StrategyRegistry``, or another one with the same ``register`` method.
        strategy: called with ``start_method`` when its name is asked for; usually the strategy's class.

    """
    for name, start_method in START_METHODS.items():
        registry.register(
            name, strategy, description=DESCRIPTION.format(start_method), override=True, start_method=start_method
        )
