"""Budgets over all workers in the place of Lightning's limits per rank.

Lightning stops each rank at its own ``max_steps`` or ``max_epochs``. Here the numbers mean the same amount of work for
all ranks together, of which fast ones do more; the server keeps the count.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl


def run_budget(trainer: pl.Trainer, workers: int) -> int | None:
    """Local optimizer steps of all workers together that the trainer's limits come to; None if it has none.

    ``max_steps=S`` is S steps for each of the workers. ``max_epochs=E`` is as many steps as E epochs have on a rank
    under DDP, for each of the workers. With manual optimization Lightning's ``max_steps`` counts the steps of all
    optimizers, a local step is one of the first optimizer, and an epoch is taken to have one for each batch.

    Raises:
        ValueError: ``max_epochs`` is given and the length of an epoch is unknown.

    """
    module = trainer.lightning_module
    limits = []
    if trainer.max_steps != -1:
        optimizers = 1 if module.automatic_optimization else max(1, len(trainer.strategy.optimizers))
        limits.append(math.ceil(trainer.max_steps / optimizers) * workers)
    epochs = trainer.fit_loop.max_epochs
    # The number of batches is not known before the data is there; setup asks, too, and gets what can be known by then.
    if epochs is not None and epochs != -1 and trainer.fit_loop._combined_loader is not None:
        batches = trainer.num_training_batches
        if batches != math.inf:
            accumulate = trainer.accumulate_grad_batches if module.automatic_optimization else 1
            limits.append(epochs * math.ceil(batches / accumulate) * workers)
        else:
            raise ValueError(
                f"max_epochs={epochs} was given, but the training data has no length, so what an epoch of all ranks "
                "together is cannot be said; give max_steps alone, or limit_train_batches as a number of batches"
            )
    return min(limits, default=None)


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
        if loop.max_epochs is not None and loop.max_epochs != -1:
            loop.max_epochs = _Unreached(loop.max_epochs)
        if loop.epoch_loop.max_steps != -1:
            loop.epoch_loop.max_steps = _Unreached(loop.epoch_loop.max_steps)

    def stop(self) -> None:
        """The budget is met: the trainer ends after this batch, whatever minimum of its own this rank has reached."""
        self._trainer.fit_loop.min_epochs = 0
        self._trainer.fit_loop.epoch_loop.min_steps = None
        self._trainer.should_stop = True

    def restore(self) -> None:
        """Puts the trainer's own limits back."""
        loop = self._trainer.fit_loop
        loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps, loop.epoch_loop.min_steps = self._before
        self._trainer.limit_val_batches = self._validation
