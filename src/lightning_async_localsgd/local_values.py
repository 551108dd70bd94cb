"""Says once what a collective gives while ranks run at their own speed: the value of the rank that asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl

_GATHER = (
    "self.all_gather (strategy.all_gather) in training gives the value of the rank that asks, without a dimension for "
    "the ranks: they run at their own speed and do not wait for each other; what is logged with self.log reaches the "
    "loggers as the mean over workers"
)
_REDUCE = (
    "self.log(..., sync_dist=True) (strategy.reduce) in training does not wait for other ranks, which run at their own "
    "speed; the loggers get the mean over the workers' latest rounds anyway, with and without sync_dist=True"
)


class LocalValues:
    """Warns of collectives that are local in the asynchronous phase, once each.

    In rank 0's validation nothing needs saying: it validates on all data.

    Args:
        trainer: the trainer whose asynchronous phase has begun.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._said: set[str] = set()
        modules = trainer.lightning_module.named_modules()
        names = [name for name, module in modules if getattr(module, "dist_sync_on_step", False) is True]
        if names:
            rank_zero_warn(
                f"{', '.join(names)}: dist_sync_on_step=True has no effect in training, where ranks run at their own "
                "speed and there is no process group; each rank's metric shows its own samples"
            )

    def gathers(self) -> None:
        """``all_gather`` has been called."""
        self._say(_GATHER)

    def reduces(self, value: Any) -> None:
        """``reduce`` has been called."""
        # Lightning itself reduces the lengths of data loaders, which are whole numbers, when it loads them again.
        if isinstance(value, Tensor) and value.is_floating_point():
            self._say(_REDUCE)

    def _say(self, text: str) -> None:
        if self._trainer.training and text not in self._said:
            self._said.add(text)
            rank_zero_warn(text)
