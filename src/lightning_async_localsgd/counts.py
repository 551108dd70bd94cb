"""Lightning's counters in global steps, on every rank.

Lightning counts each rank's own batches and steps. Here ranks take unequal shares, so while they run asynchronously
``trainer.global_step``, the loggers' x-axis and everything that happens "every n steps" follow the global progress:
local steps of all workers / number of workers. Curves of runs with other speeds then lie over each other, and a
checkpoint says how far the run had come, whoever had done the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from lightning_async_localsgd.limits import counted_optimizers, steps_of_an_optimizer
from lightning_async_localsgd.trainer_parts import model_checkpoints_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.epochs import TrainingData
    from lightning_async_localsgd.phase_base import Phase

HAIR = 1e-6
"""The progress is a sum of estimates: a hair below a whole number is that number."""


class _Interval(int):
    """The n of an "every n": ``count % n`` is 0 exactly when the global progress has just passed a multiple of n.

    One step of this rank may be several global steps, or less than one, so that its own count would skip multiples of
    n, or meet one of them more than once.
    """

    _remainder: Callable[[int, int], int]

    def __new__(cls, n: int, remainder: Callable[[int, int], int]) -> _Interval:
        interval = super().__new__(cls, n)
        interval._remainder = remainder
        return interval

    def __rmod__(self, count: int) -> int:
        return self._remainder(count, int(self))

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


class GlobalCounts:
    """Makes a trainer count global steps until :meth:`release`.

    Args:
        trainer: the trainer, its counters restored if it resumes.
        phase: this rank's part in the exchange, which knows the progress.
        data: the training data, which knows whether epochs are the run's or each rank's own.

    Attributes:
        steps: global steps, with the one that is being taken.

    """

    def __init__(self, trainer: pl.Trainer, phase: Phase, data: TrainingData) -> None:
        self._trainer = cast("Any", trainer)  # Much of what is read of it is set by its connectors.
        self._phase = phase
        self._data = data
        # With manual optimization Lightning counts the steps of all optimizers.
        self._factor = counted_optimizers(trainer)
        self.steps = max(steps_of_an_optimizer(trainer), math.floor(phase.progress + HAIR))
        self._before = self.steps
        # Batches of a rank, on the run's own clock: those of this rank for each of its steps, times the global ones. A
        # single rank's are its own.
        self._single = phase.alone and phase.workers == 1
        own = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        self._batches = float(own if self._single else self.steps * self._trainer.accumulate_grad_batches)
        self._batches_before = self._batches
        self._own_batches = self._own_steps = 0
        self._epoch: int = trainer.current_epoch
        # Where on that clock the epoch begins, for a resumed run in the midst of it.
        self._epoch_length = self._batches_of_epoch()
        begin = self._epoch * self._epoch_length
        self._epoch_begun_at = begin if begin <= self._batches < begin + self._epoch_length else self._batches
        self._log_interval: int = self._trainer.log_every_n_steps
        if self._log_interval:
            self._trainer.log_every_n_steps = _Interval(self._log_interval, self._remainder_of_steps)
        self._checkpoints = [
            (checkpoint, checkpoint._every_n_train_steps)
            for checkpoint in model_checkpoints_of(trainer)
            if checkpoint._every_n_train_steps
        ]
        for checkpoint, steps in self._checkpoints:
            checkpoint._every_n_train_steps = _Interval(steps, self._remainder_of_counts)
        self.before_epoch()

    def before_epoch(self) -> None:
        """An epoch of this rank is about to begin; its data loaders may be new."""
        if self._trainer.current_epoch != self._epoch:
            self._epoch = self._trainer.current_epoch
            begin = self._epoch_begun_at + self._epoch_length
            # This rank may be far behind the run; then the epoch begins when it begins here.
            here = abs(begin - self._batches) > max(1.0, self._epoch_length / 2)
            self._epoch_begun_at = self._batches if here else begin
            self._epoch_length = self._batches_of_epoch()
        interval = self._trainer.val_check_batch
        per_epoch = self._trainer.check_val_every_n_epoch is not None
        # Epochs of the rank's own have positions of its own.
        if type(interval) is int and interval > 0 and (self._data.global_epochs or not per_epoch):
            self._trainer.val_check_batch = _Interval(interval, self._remainder_of_batches)

    def before_batch(self) -> None:
        """A batch of this rank is about to be trained on."""
        self._before = self.steps
        if not self._trainer.fit_loop._should_accumulate():
            self.steps = max(self.steps, math.floor(self._phase.next_progress + HAIR))
            self._trainer.fit_loop.epoch_loop._batches_that_stepped = self._step_to_log()
        self._set_global_step(self._before)

    def after_batch(self) -> None:
        """The batch has been trained on, and a step taken if one was due."""
        if self._phase.stopped:
            self.finish()
        if not self._trainer.fit_loop._should_accumulate():
            self._trainer.fit_loop.epoch_loop._batches_that_stepped = self._step_to_log()
        self._set_global_step(self.steps)
        self._batches_before = self._batches
        self._own_batches += 1
        if self._trainer.fit_loop._should_accumulate():
            return  # Nothing happens in the midst of a step.
        if self._single:
            self._batches += self._own_batches
        elif self.steps > self._before:
            self._batches += self._own_batches * (self.steps - self._before) / max(1, self._own_steps)
        else:
            return
        self._own_batches = self._own_steps = 0

    def count_step(self) -> None:
        """This rank has taken an optimizer step."""
        self._own_steps += 1

    @contextmanager
    def counted_as(self, steps: int) -> Iterator[None]:
        """The trainer counts ``steps`` global steps for a while."""
        progress = self._progress
        before = progress.ready, progress.completed
        self._set_global_step(steps)
        try:
            yield
        finally:
            progress.ready, progress.completed = before

    def finish(self) -> None:
        """Training is over; this rank may have waited for others after its own last step."""
        self.agree(max(self.steps, round(self._phase.progress)))

    def agree(self, steps: int) -> None:
        """The run has taken ``steps`` global steps."""
        self.steps = steps
        self._set_global_step(steps)
        self._trainer.fit_loop.epoch_loop._batches_that_stepped = steps

    def release(self) -> None:
        """Gives the trainer its own intervals back. What was counted stays."""
        self._trainer.log_every_n_steps = int(self._log_interval)
        for checkpoint, steps in self._checkpoints:
            checkpoint._every_n_train_steps = steps
        if isinstance(self._trainer.val_check_batch, _Interval):
            self._trainer.val_check_batch = int(self._trainer.val_check_batch)

    @property
    def _progress(self) -> Any:
        loop = self._trainer.fit_loop.epoch_loop
        if self._trainer.lightning_module.automatic_optimization:
            return loop.automatic_optimization.optim_progress.optimizer.step.total
        return loop.manual_optimization.optim_step_progress.total

    def _batches_of_epoch(self) -> float:
        """An epoch on the run's clock: no whole number where ranks share one batch more or less."""
        items = self._data.items_of_epoch
        return 0.0 if items is None else items / self._phase.budget.total_per_planned_step(self._phase.workers)

    def _set_global_step(self, steps: int) -> None:
        progress = self._progress
        progress.ready = progress.completed = steps * self._factor

    def _step_to_log(self) -> int:
        """Where on the x-axis this step's values belong: as under DDP one less than the steps taken then."""
        every = self._log_interval
        if every and self.steps // every > self._before // every:
            return self.steps // every * every - 1
        return max(0, self.steps - 1)

    def _remainder_of_steps(self, count: int, n: int) -> int:
        if not self._trainer.training:
            return count % n  # An evaluation counts its own batches.
        return 0 if self.steps // n > self._before // n else max(1, count % n)

    def _remainder_of_counts(self, count: int, n: int) -> int:
        """As the trainer counts: the steps of all optimizers."""
        before, now = self._before * self._factor, self.steps * self._factor
        return 0 if now // n > before // n else max(1, count % n)

    def _remainder_of_batches(self, count: int, n: int) -> int:
        counts = self._batches_before, self._batches
        before, now = (math.floor(count + HAIR) for count in counts)
        if self._trainer.check_val_every_n_epoch is not None:
            length = int(self._trainer.num_training_batches)
            before, now = (math.floor(count - self._epoch_begun_at + HAIR) for count in counts)
            # The estimate must not pass the epoch's end before its last batch, nor stay behind it then.
            before, now = min(max(before, 0), length - 1), min(max(now, 0), length - 1)
            if self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                now = length
        return 0 if now // n > before // n else max(1, count % n)
