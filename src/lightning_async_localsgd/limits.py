"""Budgets over all workers in the place of Lightning's limits per rank.

Lightning stops each rank at its own ``max_steps`` or ``max_epochs``. Here the numbers mean the same amount of work for
all ranks together, of which fast ones do more; the server keeps the count.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_async_localsgd.plan import EpochSteps, RunBudget
from lightning_async_localsgd.trainer_parts import accumulated_batches

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.epochs import TrainingData


def run_budget(trainer: pl.Trainer, workers: int, data: TrainingData | None = None) -> RunBudget:
    """The budget of all workers together that the trainer's limits come to.

    ``max_steps=S`` is S steps for each of the workers. ``max_epochs=E`` is every sample E times, whoever takes it;
    where data cannot be leased, as many steps as E epochs have on a rank under DDP, for each of the workers. With
    manual optimization Lightning's ``max_steps`` counts the steps of all optimizers, a local step is one of the first
    optimizer, and an epoch is taken to have one for each batch.

    Args:
        trainer: the trainer.
        workers: their number.
        data: the training data; None while it is not there, which only asks whether the limits make sense.

    Raises:
        ValueError: ``max_epochs`` is given and the length of an epoch is unknown.

    """
    by_steps: RunBudget | None = None
    by_epochs: RunBudget | None = None
    if trainer.max_steps != -1:
        planned = math.ceil(trainer.max_steps / counted_optimizers(trainer))
        by_steps = RunBudget(planned * workers, planned, "max_steps")
    epochs = trainer.fit_loop.max_epochs
    # The number of batches is not known before the data is there; setup asks, too, and gets what can be known by then.
    if epochs is not None and epochs != -1 and trainer.fit_loop._combined_loader is not None:
        batches = trainer.num_training_batches
        if batches == math.inf:
            raise ValueError(
                f"max_epochs={epochs} was given, but the training data has no length, so what an epoch of all ranks "
                "together is cannot be said; give max_steps alone, or limit_train_batches as a number of batches"
            )
        by_epoch = None if data is None else epoch_steps(trainer, data, range(epochs))
        if by_epoch:
            by_epochs = RunBudget.of_epochs(by_epoch)
        else:
            planned = sum(planned_steps(trainer, epoch) for epoch in range(epochs))
            by_epochs = RunBudget(planned * workers, planned, "max_epochs")
    # Of two that come to the same, the one by epochs, which uses every sample.
    found = [budget for budget in (by_epochs, by_steps) if budget is not None]
    return min(found, key=lambda budget: budget.planned or 0, default=RunBudget(None, None))


def epoch_steps(trainer: pl.Trainer, data: TrainingData, epochs: range) -> list[EpochSteps] | None:
    """What some epochs come to with the data that is there; None where epochs are each rank's own."""
    items = data.items_of_epoch
    if items is None:
        return None
    return [
        EpochSteps(math.ceil(items / accumulated_batches(trainer, epoch)), planned_steps(trainer, epoch))
        for epoch in epochs
    ]


def planned_steps(trainer: pl.Trainer, epoch: int) -> int:
    """Optimizer steps that each rank would take in an epoch under DDP, with the data that is there."""
    return math.ceil(trainer.num_training_batches / accumulated_batches(trainer, epoch))


def steps_of_an_optimizer(trainer: pl.Trainer) -> int:
    """Optimizer steps that a trainer has counted; with manual optimization it counts those of all optimizers."""
    return trainer.global_step // counted_optimizers(trainer)


def counted_optimizers(trainer: pl.Trainer) -> int:
    """How many of a trainer's counted steps are one step of each optimizer."""
    automatic = trainer.lightning_module.automatic_optimization
    return 1 if automatic else max(1, len(trainer.strategy.optimizers))


def has_minimum(trainer: pl.Trainer) -> bool:
    """Whether a trainer is to go on for a while, whoever asks it to stop."""
    return bool(trainer.fit_loop.min_epochs or trainer.fit_loop.epoch_loop.min_steps)


class _Unreached(int):
    """A limit as the user wrote it, which Lightning's loops never find reached.

    Callbacks and modules go on reading their ``max_steps`` and ``max_epochs``; only the comparison ``count >= limit``
    that ends a loop is never true.
    """

    def __le__(self, other: object) -> bool:
        return False


class LiftedLimits:
    """Lifts a trainer's limits per rank, until :meth:`restore`.

    Args:
        trainer: the trainer, about to run its first batch.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        loop = trainer.fit_loop
        self._before = (loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps, loop.epoch_loop.min_steps)
        self._validation = trainer.limit_val_batches
        self.lift_epochs()
        if loop.epoch_loop.max_steps != -1:
            loop.epoch_loop.max_steps = _Unreached(loop.epoch_loop.max_steps)

    def lift_epochs(self) -> None:
        """Lifts the limit of epochs, whatever a callback has made of it since."""
        epochs = self._before[0]
        self._trainer.fit_loop.max_epochs = epochs if epochs is None or epochs == -1 else _Unreached(epochs)

    def keep_epochs(self) -> None:
        """A rank's epochs are the run's: its own ``max_epochs`` ends it, and nothing else need be counted."""
        self._trainer.fit_loop.max_epochs = self._before[0]

    def stop(self, met: bool) -> None:
        """The run is over: the trainer ends after this batch, whatever minimum of its own this rank has reached.

        Args:
            met: the trainer's limits are met, so that Lightning finds that out by itself and ends as it always does.
                Otherwise somebody has asked to stop earlier.

        """
        loop = self._trainer.fit_loop
        loop.min_epochs = 0
        loop.epoch_loop.min_steps = None
        loop.epoch_loop.max_steps = self._before[2]
        if not met:
            self._trainer.should_stop = True

    def restore(self) -> None:
        """Puts the trainer's own limits back."""
        loop = self._trainer.fit_loop
        loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps, loop.epoch_loop.min_steps = self._before
        self._trainer.limit_val_batches = self._validation
