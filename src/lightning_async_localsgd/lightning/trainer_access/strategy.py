"""The trainer's strategy and what Lightning's strategies and launchers use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies.launchers.launcher import _Launcher

if TYPE_CHECKING:
    from datetime import timedelta
    from pathlib import Path

    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy
    from torch import nn

Launcher = _Launcher
"""Base class of the objects that start the processes of a Trainer call."""


class AsyncStrategy(Protocol):
    """What other modules use of the strategy."""

    checkpoint_every: int | timedelta | None
    run_name: str

    @property
    def optimizer_file(self) -> Path | None:
        """File that this worker's inner optimizer states were loaded from."""

    def takes_part(self, fitting: bool) -> bool:
        """Return whether this process takes part in the Trainer call that the script has reached."""

    def add_server_state(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Add the server's state to a checkpoint that the trainer has made, on rank 0; return the state, if any."""


def strategy_of(trainer: pl.Trainer) -> AsyncStrategy:
    """Return the trainer's strategy, which is one of this package."""
    return cast("AsyncStrategy", trainer.strategy)


def is_interactive() -> bool:
    """Return whether Lightning considers this Python session interactive, such as a notebook."""
    return bool(_IS_INTERACTIVE)


def remove_batch_norm_sync(strategy: DDPStrategy) -> bool:
    """Leave the BatchNorm layers of models as they are; return whether the trainer has ``sync_batchnorm=True``."""
    removed = strategy._layer_sync is not None
    strategy._layer_sync = None
    return removed


def sync_module_states(module: nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0, through the default process group."""
    _sync_module_states(module)


def trainer_of(module: pl.LightningModule | None) -> pl.Trainer | None:
    """Return the trainer that the module is attached to, if any. ``module.trainer`` raises an error instead of None."""
    return None if module is None else module._trainer
