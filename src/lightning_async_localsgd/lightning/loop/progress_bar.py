"""The trainer's progress bar over the budget of all workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.lightning.mixed_in import mixed_in

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.runtime.base import Runtime


class GlobalProgressBar:
    """Make the trainer's progress bar show the progress of the whole run, until :meth:`restore`.

    Args:
        trainer: the trainer of rank 0.
        runtime: rank 0's part in asynchronous training.

    """

    def __init__(self, trainer: pl.Trainer, runtime: Runtime) -> None:
        bar = trainer.progress_bar_callback
        self._restore = None if bar is None else mixed_in(bar, _GlobalProgress, _runtime=runtime)

    def restore(self) -> None:
        """Make the bar show rank 0's batches again."""
        if self._restore is not None:
            self._restore()


class _GlobalProgress:
    """Mixin for the trainer's progress bar: total and position are steps of all workers, not batches of rank 0."""

    _runtime: Runtime

    @property
    def total_train_batches(self) -> float:
        """Local steps of all workers, of the script's own batch size."""
        budget = self._runtime.budget
        return float("inf") if budget.total is None else round(budget.total / budget.unit)

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)  # type: ignore[misc]
        # Do not reset the bar: rank 0's epochs are not epochs of the run. tqdm computes its rate from `initial`.
        bar = getattr(self, "train_progress_bar", None)
        if bar is not None and hasattr(bar, "initial"):
            bar.initial = self._position

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, self._position - 1)  # type: ignore[misc]

    @property
    def _position(self) -> int:
        return round(self._runtime.local_steps)
