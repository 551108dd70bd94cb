"""Registration of the names for ``Trainer(strategy=...)``.

The names are registered in one of two ways. If the package is installed, ``import torch`` calls its entry point, see
:mod:`lightning_async_localsgd_autoload`. If entry points are switched off (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``) or the
package is only on the path, ``import lightning_async_localsgd`` registers the names. Both ways serve
``lightning.pytorch`` and ``pytorch_lightning``, each with its own class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_async_localsgd_autoload import DESCRIPTION, SIMULATED, SIMULATED_DESCRIPTION, START_METHODS

if TYPE_CHECKING:
    from collections.abc import Callable


def text_for_other_package(name: str, base: type) -> str:
    """Return the text that Lightning's other package shows when it refuses a strategy of this one.

    Args:
        name: name of the strategy's class.
        base: Lightning's class that the strategy derives from.

    """
    mine, other, path = "lightning.pytorch", "pytorch_lightning", "lightning_async_localsgd.pytorch_lightning"
    if not base.__module__.startswith(mine):
        mine, other, path = other, mine, "lightning_async_localsgd"
    return f"<{name} for {mine}.Trainer; for {other}.Trainer use {path}.{name}>"


def register_simulated(registry: Any, strategy: Callable[..., Any]) -> None:
    """Register the strategy that simulates a cluster. Replaces an earlier registration.

    Args:
        registry: Lightning's ``StrategyRegistry``, or an object with the same ``register`` method.
        strategy: called when the name is looked up; usually the strategy's class.

    """
    registry.register(SIMULATED, strategy, description=SIMULATED_DESCRIPTION, override=True)


def register_names(registry: Any, strategy: Callable[..., Any]) -> None:
    """Register the live strategy under all of its names. Replaces earlier registrations.

    Args:
        registry: Lightning's ``StrategyRegistry``, or an object with the same ``register`` method.
        strategy: called with ``start_method`` when a name is looked up; usually the strategy's class.

    """
    for name, start_method in START_METHODS.items():
        registry.register(
            name, strategy, description=DESCRIPTION.format(start_method), override=True, start_method=start_method
        )
