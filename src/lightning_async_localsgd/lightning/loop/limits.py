"""The trainer's limits as a budget of all workers.

Lightning stops each rank at ``max_steps`` or ``max_epochs`` of its own. Here the same numbers mean the same amount of
work for all ranks together. Fast ranks do more of the work than slow ones, and the server counts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_async_localsgd.lightning.data.batch_sizes import accumulated_batches
from lightning_async_localsgd.lightning.trainer_access.data import combined_loader
from lightning_async_localsgd.policies.plan import EpochSteps, RunBudget

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.lightning.data.training_data import TrainingData


def run_budget(trainer: pl.Trainer, workers: int, data: TrainingData | None = None) -> RunBudget:
    """Return the budget of all workers together that the trainer's limits define.

    ``max_steps=S`` means S steps for each worker. With manual optimization Lightning's ``max_steps`` counts the steps
    of all optimizers. A local step is then a step of the first optimizer, and an epoch is assumed to have one local
    step for each batch.

    ``max_epochs=E`` means that every sample is used E times, by any worker. If data cannot be leased, it means as many
    steps for each worker as E epochs have on a rank under DDP. If workers have batch sizes of their own, a step is one
    of the script's own batch size, and samples are counted. If the data has no length, epochs cannot be counted in
    advance, and ``max_steps`` is the only limit.

    Args:
        trainer: the trainer.
        workers: number of workers.
        data: the training data; None before it is set up, to check only whether the limits make sense.

    Raises:
        ValueError: ``max_epochs`` is the only limit, but the length of an epoch is unknown.

    """
    by_steps: RunBudget | None = None
    by_epochs: RunBudget | None = None
    unit = 1 if data is None else data.step_samples or 1
    if trainer.max_steps != -1:
        steps_per_rank = math.ceil(trainer.max_steps / counted_optimizers(trainer))
        by_steps = RunBudget(steps_per_rank * workers * unit, steps_per_rank, "max_steps", unit=unit)
    epochs = trainer.fit_loop.max_epochs
    # The strategy's setup calls this function before Lightning has set data up, and the number of batches is known.
    if epochs is not None and epochs != -1 and combined_loader(trainer) is not None:
        if trainer.num_training_batches == math.inf:
            if by_steps is None:
                raise ValueError(_no_length_text(epochs))
            if data is not None:  # The last call before training.
                rank_zero_info(
                    f"max_epochs={epochs} has no effect, because the training data has no length; max_steps="
                    f"{trainer.max_steps} ends training."
                )
            return by_steps
        by_epoch = None if data is None else epoch_steps(trainer, data, range(epochs))
        if by_epoch:
            by_epochs = RunBudget.of_epochs(by_epoch, unit)
        else:
            steps_per_rank = sum(epoch_steps_per_rank(trainer, epoch) for epoch in range(epochs))
            by_epochs = RunBudget(steps_per_rank * workers, steps_per_rank, "max_epochs")
    # The smaller budget counts. If both are equal, the budget by epochs comes first, because it uses every sample.
    budgets = [budget for budget in (by_epochs, by_steps) if budget is not None]
    return min(budgets, key=lambda budget: budget.steps_per_rank or 0, default=RunBudget(None, None, unit=unit))


def _no_length_text(epochs: int) -> str:
    """Return the error text for data without a length and no limit of steps."""
    given = f"max_epochs={epochs}" + (" (Lightning's default without another limit)" if epochs == 1000 else "")
    return (
        f"The training data has no length, so the steps of an epoch are unknown, and {given} cannot end training. Set "
        "max_steps to a number of steps for each rank, or limit_train_batches to a number of batches in an epoch."
    )


def epoch_steps(trainer: pl.Trainer, data: TrainingData, epochs: range) -> list[EpochSteps] | None:
    """Return the number of steps, or of samples if these are counted, in each epoch with the current data.

    None if each rank has epochs of its own.
    """
    items = data.items_per_epoch
    if items is None:
        return None
    return [
        EpochSteps(
            items if data.step_samples else math.ceil(items / accumulated_batches(trainer, epoch)),
            epoch_steps_per_rank(trainer, epoch),
        )
        for epoch in epochs
    ]


def epoch_steps_per_rank(trainer: pl.Trainer, epoch: int) -> int:
    """Return the number of optimizer steps that each rank would take in an epoch under DDP, with the current data."""
    return math.ceil(trainer.num_training_batches / accumulated_batches(trainer, epoch))


def steps_of_an_optimizer(trainer: pl.Trainer) -> int:
    """Return the trainer's step count per optimizer. With manual optimization the trainer counts all optimizers."""
    return trainer.global_step // counted_optimizers(trainer)


def counted_optimizers(trainer: pl.Trainer) -> int:
    """Return by how much ``trainer.global_step`` grows when each optimizer takes one step."""
    automatic = trainer.lightning_module.automatic_optimization
    return 1 if automatic else max(1, len(trainer.strategy.optimizers))


def has_minimum(trainer: pl.Trainer) -> bool:
    """Return whether ``min_epochs`` or ``min_steps`` is set, so that a request to stop may have to wait."""
    return bool(trainer.fit_loop.min_epochs or trainer.fit_loop.epoch_loop.min_steps)


class _UnreachableLimit(int):
    """A limit with the user's value that Lightning's loops never consider reached.

    Callbacks and modules can still read ``max_steps`` and ``max_epochs``. Only the comparison ``count >= limit``, which
    ends a loop, is always false.
    """

    def __le__(self, other: object) -> bool:
        return False


class SuspendedLimits:
    """Suspend a trainer's limits per rank, until :meth:`restore`.

    Args:
        trainer: the trainer, before its first batch.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        loop = trainer.fit_loop
        self._limits = (loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps, loop.epoch_loop.min_steps)
        self._limit_val_batches = trainer.limit_val_batches
        self.suspend_epochs()
        if loop.epoch_loop.max_steps != -1:
            loop.epoch_loop.max_steps = _UnreachableLimit(loop.epoch_loop.max_steps)

    def suspend_epochs(self) -> None:
        """Suspend ``max_epochs``, even if a callback has changed the value since."""
        epochs = self._limits[0]
        self._trainer.fit_loop.max_epochs = epochs if epochs is None or epochs == -1 else _UnreachableLimit(epochs)

    def keep_epochs(self) -> None:
        """Let the trainer's own ``max_epochs`` end the run, because a rank's epochs are those of the run."""
        self._trainer.fit_loop.max_epochs = self._limits[0]

    def end_training(self, limit_reached: bool) -> None:
        """End the trainer's loop after the current batch, whether or not this rank has reached a minimum.

        Args:
            limit_reached: whether the run has reached the trainer's limit, so that Lightning ends as usual. Otherwise
                training was stopped earlier.

        """
        loop = self._trainer.fit_loop
        loop.min_epochs = 0
        loop.epoch_loop.min_steps = None
        loop.epoch_loop.max_steps = self._limits[2]
        if not limit_reached:
            self._trainer.should_stop = True

    def restore(self) -> None:
        """Restore the trainer's own limits."""
        loop = self._trainer.fit_loop
        loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps, loop.epoch_loop.min_steps = self._limits
        self._trainer.limit_val_batches = self._limit_val_batches
