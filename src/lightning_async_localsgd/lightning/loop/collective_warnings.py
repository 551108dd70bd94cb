"""Warnings about collectives that only see their own rank while ranks run at their own speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl

_ALL_GATHER = (
    "self.all_gather (strategy.all_gather) in training returns the calling rank's own value, without a dimension for "
    "ranks, because ranks run at their own speed and do not wait for each other. Use self.log instead: loggers get the "
    "mean over workers."
)
_REDUCE = (
    "self.log(..., sync_dist=True) (strategy.reduce) in training does not wait for other ranks, which run at their own "
    "speed. Loggers get the mean over the workers' latest rounds with and without sync_dist=True."
)


class CollectiveWarnings:
    """Warn once about each kind of collective that is local during asynchronous training.

    Rank 0's validation needs no warning, because rank 0 validates on all data.

    Args:
        trainer: the trainer, in asynchronous training.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._warned: set[str] = set()
        modules = trainer.lightning_module.named_modules()
        names = [name for name, module in modules if getattr(module, "dist_sync_on_step", False) is True]
        if names:
            rank_zero_warn(
                f"{', '.join(names)}: dist_sync_on_step=True has no effect in training, because ranks run at their own "
                "speed without a process group. On each rank the metric covers that rank's samples only."
            )

    def on_all_gather(self) -> None:
        """Warn about ``all_gather``."""
        self._warn_once(_ALL_GATHER)

    def on_reduce(self, value: Any) -> None:
        """Warn about ``reduce``, unless Lightning itself has called it."""
        # Lightning reduces the lengths of reloaded data loaders, which are integers.
        if isinstance(value, Tensor) and value.is_floating_point():
            self._warn_once(_REDUCE)

    def _warn_once(self, text: str) -> None:
        if self._trainer.training and text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(text)
