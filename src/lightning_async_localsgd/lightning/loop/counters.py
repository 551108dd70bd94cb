"""Lightning's counters in global steps, on every rank.

Lightning counts each rank's own batches and steps. In asynchronous training the ranks' shares are unequal, so
``trainer.global_step``, the loggers' x-axis and everything that happens "every n steps" follow the global progress:
local steps of all workers / number of workers. Curves of runs with different speeds can then be compared, and a
checkpoint's step tells how much work all workers have done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from lightning_async_localsgd.lightning.data.batch_sizes import accumulated_batches
from lightning_async_localsgd.lightning.loop.limits import counted_optimizers, steps_of_an_optimizer
from lightning_async_localsgd.lightning.loop.step_axis import StepAxis
from lightning_async_localsgd.lightning.trainer_access.callbacks import (
    model_checkpoints_of,
    set_steps_between_checkpoints,
    steps_between_checkpoints,
)
from lightning_async_localsgd.lightning.trainer_access.loop import set_logged_step, should_accumulate, step_progress
from lightning_async_localsgd.runtime.global_steps import TOLERANCE

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.lightning.data.training_data import TrainingData
    from lightning_async_localsgd.runtime.base import Runtime


class _GlobalInterval(int):
    """The n of an "every n", for which ``count % n`` is 0 when the global progress has just passed a multiple of n.

    One step of this rank may be several global steps, or a part of one. A plain count would skip multiples of n, or
    stay at one for several steps.
    """

    remainder: Callable[[int, int], int]

    def __new__(cls, n: int, remainder: Callable[[int, int], int]) -> _GlobalInterval:
        interval = super().__new__(cls, n)
        interval.remainder = remainder
        return interval

    def __rmod__(self, count: int) -> int:
        return self.remainder(count, int(self))

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


class GlobalStepCounters:
    """Make a trainer count global steps, until :meth:`restore`.

    Args:
        trainer: the trainer, with restored counters if the run is resumed.
        runtime: this rank's part in asynchronous training, which knows the progress.
        data: the training data, which knows whether epochs are those of the run or each rank's own.

    Attributes:
        steps: global steps, including the current one.
        axis: knows the global step of each batch.

    """

    def __init__(self, trainer: pl.Trainer, runtime: Runtime, data: TrainingData) -> None:
        self._trainer = cast("Any", trainer)  # Many of its attributes are set by its connectors.
        self._runtime = runtime
        self._data = data
        # With manual optimization Lightning counts the steps of all optimizers.
        self._factor = counted_optimizers(trainer)
        self.steps = max(steps_of_an_optimizer(trainer), math.floor(runtime.global_steps + TOLERANCE))
        self._steps_before = self.steps
        # A single worker's batches are simply counted. With several workers, batches follow from the steps.
        self._single_worker = runtime.single_process and runtime.workers == 1
        self._batches = int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)
        self._batches_before = self._batches
        self._unseen_batches = 0
        self.axis = StepAxis(
            trainer, runtime.budget, runtime.workers, runtime.step_offset, data, self.steps, runtime.reserved_units
        )
        self._epoch: int = trainer.current_epoch
        # The batch at which a single worker's epoch has begun. A resumed run may be in the middle of an epoch.
        length = data.items_per_epoch or 0
        begin = self._epoch * length
        self._epoch_start = begin if begin <= self._batches < begin + length else self._batches
        self._log_interval: int = self._trainer.log_every_n_steps
        if self._log_interval:
            self._trainer.log_every_n_steps = _GlobalInterval(self._log_interval, self._remainder_for_logging)
        self._checkpoints = [
            (checkpoint, steps)
            for checkpoint in model_checkpoints_of(trainer)
            if (steps := steps_between_checkpoints(checkpoint))
        ]
        for checkpoint, steps in self._checkpoints:
            set_steps_between_checkpoints(checkpoint, _GlobalInterval(steps, self._remainder_for_checkpoints))
        self.before_epoch()

    def before_epoch(self) -> None:
        """Update the intervals and the length of the epoch, whose data loaders may be new."""
        self.axis.update(self._runtime.budget)
        if self._trainer.current_epoch != self._epoch:
            self._epoch, self._epoch_start = self._trainer.current_epoch, self._batches
        interval = self._trainer.val_check_batch
        per_epoch = self._trainer.check_val_every_n_epoch is not None
        # In epochs of the rank's own, positions are the rank's own, too.
        if type(interval) is int and interval > 0 and (self._data.global_epochs or not per_epoch):
            self._trainer.val_check_batch = _GlobalInterval(interval, self._remainder_for_validation)

    def before_batch(self) -> None:
        """Count the step to which the next batch of this rank belongs."""
        self._steps_before = self.steps
        if not should_accumulate(self._trainer):
            self.steps = self._step_of_batch()
            set_logged_step(self._trainer, self._logged_step())
        self._set_global_step(self._steps_before)

    def after_batch(self) -> None:
        """Update the counters after a batch of this rank and, if the batch completed one, its optimizer step."""
        if self._runtime.stopped:
            self.finish()
        if not should_accumulate(self._trainer):
            set_logged_step(self._trainer, self._logged_step())
        self._set_global_step(self.steps)
        if self._single_worker:
            self._unseen_batches += 1
            self._batches_before = self._batches
            if not should_accumulate(self._trainer):  # In the middle of a step no interval can end.
                self._batches += self._unseen_batches
                self._unseen_batches = 0

    @contextmanager
    def counting(self, steps: int) -> Iterator[None]:
        """Set ``trainer.global_step`` for the duration of a ``with`` block."""
        progress = self._progress
        before = progress.ready, progress.completed
        self._set_global_step(steps)
        try:
            yield
        finally:
            progress.ready, progress.completed = before

    def finish(self) -> None:
        """Count the steps that other ranks have taken after this rank's last step."""
        self.set_steps(max(self.steps, round(self._runtime.global_steps)))

    def set_steps(self, steps: int) -> None:
        """Set the number of global steps that the run has taken."""
        self.steps = steps
        self._set_global_step(steps)
        set_logged_step(self._trainer, steps)

    def restore(self) -> None:
        """Restore the trainer's intervals. The counters keep their values."""
        self._trainer.log_every_n_steps = int(self._log_interval)
        for checkpoint, steps in self._checkpoints:
            set_steps_between_checkpoints(checkpoint, steps)
        if isinstance(self._trainer.val_check_batch, _GlobalInterval):
            self._trainer.val_check_batch = int(self._trainer.val_check_batch)

    @property
    def _progress(self) -> Any:
        return step_progress(self._trainer)

    def _step_of_batch(self) -> int:
        """Return the global step to which the current batch belongs, as estimated."""
        estimate, epoch = self._runtime.next_global_steps, self._trainer.current_epoch
        if self._single_worker:
            return max(self.steps, math.floor(estimate + TOLERANCE))
        is_last = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not self._trainer.is_global_zero:
            return self.axis.step_of(self.steps, estimate, epoch, is_last)
        return self.axis.step_of_host(self.steps, estimate, epoch, is_last, self._data.position_of_batch(epoch))

    def _set_global_step(self, steps: int) -> None:
        progress = self._progress
        progress.ready = progress.completed = steps * self._factor

    def _logged_step(self) -> int:
        """Return the current step's position on the loggers' x-axis. As under DDP it counts from 0."""
        every = self._log_interval
        if every and self.steps // every > self._steps_before // every:
            return self.steps // every * every - 1
        return max(0, self.steps - 1)

    def _remainder_for_logging(self, count: int, n: int) -> int:
        if not self._trainer.training:
            return count % n  # Evaluation counts its own batches.
        return 0 if self.steps // n > self._steps_before // n else max(1, count % n)

    def _remainder_for_checkpoints(self, count: int, n: int) -> int:
        # As in trainer.global_step, the steps of all optimizers count.
        before, now = self._steps_before * self._factor, self.steps * self._factor
        return 0 if now // n > before // n else max(1, count % n)

    def _remainder_for_validation(self, count: int, n: int) -> int:
        before, now = self._batch_interval()
        if self._trainer.check_val_every_n_epoch is not None:
            # Global batches are an estimate. They must reach the epoch's end with its last batch, not earlier or later.
            length = int(self._trainer.num_training_batches)
            before, now = min(max(before, 0), length - 1), min(max(now, 0), length - 1)
            if self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                now = length
        return 0 if now // n > before // n else max(1, count % n)

    def _batch_interval(self) -> tuple[int, int]:
        """Return the global batches before and after the current step, of the run or of the epoch."""
        of_epoch = self._trainer.check_val_every_n_epoch is not None
        if self._single_worker:
            start = self._epoch_start if of_epoch else 0
            return self._batches_before - start, self._batches - start
        epoch = self._trainer.current_epoch
        begin = self.axis.begin(epoch) if of_epoch else 0.0
        accumulated = accumulated_batches(self._trainer, epoch)
        before, now = ((steps - begin) * accumulated for steps in (self._steps_before, self.steps))
        return math.floor(before + TOLERANCE), math.floor(now + TOLERANCE)
