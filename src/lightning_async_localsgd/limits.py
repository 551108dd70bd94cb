"""Budgets over all workers in the place of Lightning's limits per rank.

Lightning stops each rank at its own ``max_steps`` or ``max_epochs``. Here the numbers mean the same amount of work for
all ranks together, of which fast ones do more; the server keeps the count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_async_localsgd.trainer_parts import accumulated_batches

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.epochs import TrainingData


class EpochSteps(NamedTuple):
    """What an epoch comes to.

    Attributes:
        total: local steps of all workers together.
        planned: optimizer steps that each rank would take under DDP.

    """

    total: int
    planned: int


@dataclass(frozen=True)
class RunBudget:
    """What a trainer's limits come to.

    Attributes:
        total: local steps of all workers together; None for no end.
        planned: the same as the optimizer steps that each rank would take under DDP; None for no end.
        limit: which of the trainer's limits it is.
        epochs: where each rank's own ``max_epochs`` ends the run, and epochs are the run's: what each of them is
            expected to come to, of which ``total`` and ``planned`` are the sums. Else nothing.

    """

    total: int | None
    planned: int | None
    limit: Literal["max_steps", "max_epochs"] | None = None
    epochs: tuple[EpochSteps, ...] = ()

    @classmethod
    def of_epochs(cls, epochs: Sequence[EpochSteps]) -> RunBudget:
        """The budget of a run that ends with its data."""
        total, planned = (sum(numbers) for numbers in zip(*epochs, strict=True)) if epochs else (0, 0)
        return cls(total, planned, "max_epochs", tuple(epochs))

    @property
    def ends_with_data(self) -> bool:
        """The data ends the run, and the numbers are what it is expected to come to."""
        return self.limit == "max_epochs" and bool(self.epochs)

    def at_most(self, workers: int) -> int | None:
        """Local steps that are not passed if the estimate was right; None where ``total`` is none.

        Each worker may end an epoch with a part of a window of accumulated batches.
        """
        return self.total + workers * len(self.epochs) if self.ends_with_data and self.total is not None else None

    def total_per_planned_step(self, workers: int) -> float:
        """Local steps of all workers together for each planned step of a rank."""
        return self.total / self.planned if self.total and self.planned else workers


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
    module = trainer.lightning_module
    by_steps: RunBudget | None = None
    by_epochs: RunBudget | None = None
    if trainer.max_steps != -1:
        optimizers = 1 if module.automatic_optimization else max(1, len(trainer.strategy.optimizers))
        planned = math.ceil(trainer.max_steps / optimizers)
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


class Position(NamedTuple):
    """How far a run is that ends with its data, for one that goes on from there and may have other ranks or batches.

    Attributes:
        epochs: that are done, with a part of one.
        total: local steps of all workers together that these have taken.
        planned: optimizer steps that each rank would have taken under DDP.

    """

    epochs: float
    total: int
    planned: int

    @classmethod
    def of(cls, done: int, budget: RunBudget) -> Position | None:
        """Of a run with so many local steps done; None if they are more than its data was expected to come to."""
        begin = 0
        for number, epoch in enumerate(budget.epochs):
            if done < begin + epoch.total:
                return cls.at(number + (done - begin) / epoch.total, budget)
            begin += epoch.total
        return cls.at(float(len(budget.epochs)), budget) if done == begin else None

    @classmethod
    def at(cls, epochs: float, budget: RunBudget) -> Position:
        """Where so many epochs of a run are done."""
        whole = int(epochs)
        total, planned = (sum(epoch[kind] for epoch in budget.epochs[:whole]) for kind in (0, 1))
        if whole < len(budget.epochs):
            present = budget.epochs[whole]
            total += round((epochs - whole) * present.total)
            planned += round((epochs - whole) * present.planned)
        return cls(epochs, total, planned)

    @classmethod
    def in_state(cls, state: Mapping[str, Any]) -> Position | None:
        """What a server's saved state says; None if it says nothing."""
        position = state.get("position")
        return None if position is None else cls(*position)


def restored_done(state: Mapping[str, Any], budget: RunBudget, workers: int) -> int:
    """Local steps that count as done in a run that goes on from a server's saved state.

    What ends with its data is as far in it as it was, whatever the ranks, batches and windows are now. Else what is
    done stays the same share of each worker's steps.
    """
    done, before = int(state["budget"]["done"]), int(state["initial_workers"])
    if not budget.ends_with_data:
        return round(done * workers / before)
    position = Position.in_state(state)
    return done if position is None else Position.at(position.epochs, budget).total


def steps_ahead(position: Position | None, budget: RunBudget, counted: int) -> int:
    """Global steps that a trainer has counted beyond what its run, as it goes on now, calls done.

    Args:
        position: that the run goes on from; None if there is none.
        budget: of the run.
        counted: steps that the trainer has counted.

    """
    if position is None or not budget.ends_with_data:
        return 0
    here = Position.at(position.epochs, budget)
    if here == position:
        return 0
    assert budget.total is not None
    assert budget.planned is not None
    return counted - math.floor(here.total / max(1, budget.total) * budget.planned)


def steps_of_an_optimizer(trainer: pl.Trainer) -> int:
    """Optimizer steps that a trainer has counted; with manual optimization it counts those of all optimizers."""
    automatic = trainer.lightning_module.automatic_optimization
    return trainer.global_step // (1 if automatic else max(1, len(trainer.strategy.optimizers)))


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
