"""The strategy's own hooks into the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_async_localsgd.lightning.loop.loader_deaths import LoaderDeaths
from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.lightning.loop.controller import FitController


class _Strategy(Protocol):
    @property
    def controller(self) -> FitController | None: ...

    def before_fit(self) -> None: ...


class LoopHooks(Callback):
    """Forward the training loop's hooks to the :class:`.FitController`. The first callback of the trainer in a fit.

    Later callbacks therefore see global step counts and, after training, the final model.

    Args:
        strategy: strategy that has a controller while ranks run at their own speed.

    """

    def __init__(self, strategy: _Strategy) -> None:
        self._strategy = strategy
        self._loader_deaths = LoaderDeaths()

    def add_to(self, trainer: pl.Trainer) -> None:
        """Become the trainer's first callback."""
        callbacks_of(trainer).insert(0, self)

    def remove_from(self, trainer: pl.Trainer) -> None:
        """End as the trainer's callback."""
        callbacks_of(trainer).remove(self)
        self._loader_deaths.end()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._strategy.before_fit()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (controller := self._strategy.controller) is not None:
            controller.before_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._loader_deaths.watch(trainer)
        if (controller := self._strategy.controller) is not None:
            controller.before_batch()

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if (controller := self._strategy.controller) is not None:
            controller.average_gradients()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (controller := self._strategy.controller) is not None:
            controller.after_batch()
        self._loader_deaths.raise_held()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._loader_deaths.watch(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (controller := self._strategy.controller) is not None:
            controller.after_epoch()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (controller := self._strategy.controller) is not None:
            controller.finish()
