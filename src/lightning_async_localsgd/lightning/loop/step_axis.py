"""The axis of global steps: where epochs begin and end, and at which steps rank 0 validates or saves."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_async_localsgd.lightning.data.batch_sizes import accumulated_batches
from lightning_async_localsgd.lightning.loop.limits import counted_optimizers
from lightning_async_localsgd.lightning.trainer_access.callbacks import (
    callbacks_of,
    model_checkpoints_of,
    steps_between_checkpoints,
)
from lightning_async_localsgd.runtime.global_steps import TOLERANCE, EpochSpan

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning.pytorch as pl

    from lightning_async_localsgd.lightning.data.training_data import TrainingData
    from lightning_async_localsgd.policies.plan import RunBudget

_LARGEST_RESERVED_PART = 3
"""At most one third of rank 0's equal part of an epoch is reserved for rank 0."""


def reserved_units(trainer: pl.Trainer, data: TrainingData, workers: int) -> int:
    """Return how many local steps of each epoch are reserved for rank 0, at least 1.

    Rank 0 validates and saves after its own steps. A slow or busy rank 0 needs a step of its own for each validation
    and checkpoint within an epoch, and one for the end of the epoch. If these are too many, the steps at which rank 0
    validates and saves depend on its speed, and only one step is reserved.

    Args:
        trainer: the trainer, with its data loaders.
        data: the training data.
        workers: number of workers that the run is started with.

    """
    items = data.items_per_epoch
    changes = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer))
    if items is None or workers == 1 or changes:
        return 1
    equal_part = math.ceil(items / data.items_per_step(0) / workers)
    most = math.ceil(equal_part * data.items_per_step(0) / data.own_items_per_step / _LARGEST_RESERVED_PART)
    # An interval that does not divide an epoch has one more step in some epochs than in others.
    needed = 1 + sum(math.ceil(equal_part / interval - TOLERANCE) for interval in _intervals(trainer))
    needed -= sum(equal_part % interval == 0 for interval in _intervals(trainer))
    return needed if needed <= most else 1


class StepAxis:
    """Knows the global step of each batch of a worker.

    Args:
        trainer: the trainer, with restored counters if the run is resumed.
        budget: budget of the run.
        workers: number of workers that the run was started with.
        step_offset: see :attr:`.Runtime.step_offset`.
        data: the training data.
        steps: global steps that are done. A resumed run may be in the middle of an epoch.
        reserved: see :func:`reserved_units`.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        budget: RunBudget,
        workers: int,
        step_offset: int,
        data: TrainingData,
        steps: int,
        reserved: int,
    ) -> None:
        self._trainer = trainer
        self._budget = budget
        self._workers = workers
        self._step_offset = step_offset
        self._data = data
        self._reserved = reserved
        self._items = data.items_per_epoch
        # An epoch and the global steps before it.
        self._base: tuple[int, float] = 0, step_offset
        if not budget.ends_with_data:
            first = trainer.current_epoch
            begin = sum(self._length(epoch) for epoch in range(first))
            self._base = first, begin if begin <= steps < begin + self._length(first) else float(steps)
        # The epoch that was asked for last. A run may have many epochs.
        self._latest = self._base

    def update(self, budget: RunBudget) -> None:
        """Take another budget, and read the length of the epochs again, because data loaders may be new."""
        self._budget = budget
        if self._data.items_per_epoch != self._items:
            epoch = self._trainer.current_epoch
            begin = self.begin(epoch)
            self._items = self._data.items_per_epoch
            if not budget.ends_with_data:
                self._base = epoch, begin
        self._latest = self._base

    def begin(self, epoch: int) -> float:
        """Return the global steps before an epoch that all ranks share."""
        first, begin = self._latest if self._latest[0] <= epoch else self._base
        self._latest = epoch, begin + sum(self._length(number) for number in range(first, epoch))
        return self._latest[1]

    def step_of(self, before: int, estimate: float, epoch: int, is_last: bool) -> int:
        """Return the global step of a batch of any worker.

        Args:
            before: global step of the worker's last batch.
            estimate: estimated global steps after the batch.
            epoch: the worker's epoch.
            is_last: whether the batch is the worker's last one in the epoch.

        """
        span = self._span(epoch)
        return max(before, _whole(estimate) if span is None else span.step_of(estimate, is_last))

    def step_of_host(self, before: int, estimate: float, epoch: int, is_last: bool, position: int | None) -> int:
        """Return the global step of a batch of rank 0, which stops at the steps at which it validates or saves.

        Args:
            before: global step of rank 0's last batch.
            estimate: estimated global steps after the batch.
            epoch: rank 0's epoch.
            is_last: whether the batch is rank 0's last one in the epoch.
            position: position of the batch in the order of the epoch; None if the batch belongs to an earlier epoch, or
                if ranks have epochs of their own.

        """
        span = self._span(epoch)
        step = self.step_of(before, estimate, epoch, is_last)
        if span is None or span.end == math.inf or self._reserved == 1:
            return step if is_last and span is not None else self._last_mark(before, step, epoch)
        if is_last:
            return step
        marks = _marks_within(self._trainer, span)
        ahead = marks[bisect_right(marks, before) :]
        if ahead and len(ahead) >= self._steps_left(position):
            return ahead[0]  # The progress is not known exactly, and rank 0 has no more steps than it needs.
        return min([step, *ahead[:1]])

    # ---------------------------------------------------------------- internal

    def _span(self, epoch: int) -> EpochSpan | None:
        """Return the global steps of an epoch; None if each rank has epochs of its own.

        A run that stops at ``max_steps`` may end within an epoch. That epoch has no known end.
        """
        budget = self._budget
        if not self._data.global_epochs or (budget.ends_with_data and epoch >= len(budget.epochs)):
            return None
        begin = self.begin(epoch)
        end = begin + self._length(epoch)
        if budget.ends_with_data:
            return EpochSpan(begin, end)
        last = math.inf if budget.steps_per_rank is None else budget.steps_per_rank + self._step_offset
        # Data is leased ahead of need, so a worker may begin an epoch that the run does not reach.
        return EpochSpan(begin, end) if end < last else EpochSpan(min(begin, last - 1), math.inf)

    def _length(self, epoch: int) -> float:
        """Return the global steps of an epoch. It is a fraction if ranks have unequal shares."""
        if self._budget.ends_with_data:
            planned = self._budget.epochs
            return planned[epoch].steps_per_rank if epoch < len(planned) else 0
        if self._items is None:
            return 0.0
        if self._data.step_samples:
            return self._items / self._data.step_samples / self._workers
        return math.ceil(self._items / accumulated_batches(self._trainer, epoch)) / self._workers

    def _steps_left(self, position: int | None) -> float:
        """Return how many steps rank 0 takes in the epoch after this one, if it is at its reserved part of the epoch.

        Before, the number is not known. It is at least the number of reserved steps.
        """
        unit = self._data.own_items_per_step
        if position is None or self._items is None:
            return math.inf
        if self._data.step_samples:
            # Units of other workers end anywhere, so the reserved part is counted from the end.
            left = self._items - position - self._data.items_of_batch
            return math.inf if position < self._items - self._reserved * unit else math.ceil(max(0, left) / unit)
        if position < reserved_start(self._items, unit, self._reserved):
            return math.inf
        return (self._items - 1) // unit - position // unit

    def _last_mark(self, before: int, step: int, epoch: int) -> int:
        """Return the last step after ``before`` and up to ``step`` at which rank 0 validates or saves, or ``step``.

        Earlier ones are passed over. Otherwise, a slow rank 0 would stay behind the run.
        """
        begin = self.begin(epoch) if self._data.global_epochs else 0.0
        last = [
            math.ceil(start + (step - start + TOLERANCE) // interval * interval - TOLERANCE)
            for interval, start in _intervals_from(self._trainer, begin)
        ]
        return max((mark for mark in last if before < mark <= step), default=step)


def reserved_start(items: int, unit: int, reserved: int) -> int:
    """Return the position at which the last ``reserved`` units of an epoch begin."""
    return max(0, -(-items // unit) - reserved) * unit


def _whole(steps: float) -> int:
    return math.floor(steps + TOLERANCE)


def _marks_within(trainer: pl.Trainer, span: EpochSpan) -> list[int]:
    """Return the steps within an epoch, without its end, at which rank 0 validates or saves."""
    end = math.ceil(span.end - TOLERANCE)
    marks: set[int] = set()
    for interval, start in _intervals_from(trainer, span.begin):
        number = (span.begin - start) // interval + 1
        while (mark := math.ceil(start + number * interval - TOLERANCE)) < end:
            marks.add(mark)
            number += 1
    return sorted(mark for mark in marks if mark > span.begin)


def _intervals(trainer: pl.Trainer) -> list[float]:
    return [interval for interval, _ in _intervals_from(trainer, 0.0)]


def _intervals_from(trainer: pl.Trainer, epoch_begin: float) -> Iterator[tuple[float, float]]:
    """Yield intervals in global steps at which rank 0 validates and saves, and the step at which each begins."""
    interval = trainer.val_check_batch
    if trainer.enable_validation and trainer.limit_val_batches and type(interval) is not float and interval:
        batches = accumulated_batches(trainer, trainer.current_epoch)
        yield int(interval) / batches, 0.0 if trainer.check_val_every_n_epoch is None else epoch_begin
    for checkpoint in model_checkpoints_of(trainer):
        if steps := steps_between_checkpoints(checkpoint):
            yield int(steps) / counted_optimizers(trainer), 0.0
