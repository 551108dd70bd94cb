"""Learning-rate schedulers that follow the progress of all workers, not one worker's own steps.

Lightning steps a scheduler once for every local step, or epoch, of its rank. With workers of unequal speed, fast ranks
would reach the end of the schedule early and slow ranks would stay behind. In asynchronous training, each scheduler is
therefore stepped here: once for each global step, which is local steps of all workers / number of workers (equation 3
of the paper, over the whole run). A merge does not restart schedules.
"""

from __future__ import annotations

import bisect
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.lightning.loop.limits import epoch_steps_per_rank
from lightning_async_localsgd.lightning.trainer_access.loop import step_scheduler
from lightning_async_localsgd.runtime.global_steps import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import lightning.pytorch as pl

    from lightning_async_localsgd.policies.plan import EpochSteps, RunBudget

_NEVER = 2**62
"""Frequency with which Lightning never steps a scheduler."""


class ProgressSchedulers:
    """Step a trainer's schedulers in Lightning's place, until :meth:`restore`.

    Schedulers with ``interval="step"`` follow the progress in steps. Those with ``interval="epoch"`` follow the
    progress in epochs if the number of steps in an epoch is known. Otherwise Lightning steps them, and they follow the
    rank's own epochs. With manual optimization the module steps its schedulers itself.

    Args:
        trainer: the trainer, with restored schedulers if the run is resumed.
        progress: global steps that the schedulers have already followed.
        budget: the run's budget.
        step_offset: global steps counted beyond the steps of this run, see :func:`.step_offset_of`.
        counting: returns a context in which the trainer's step count is the given number.

    Attributes:
        step_counts: number of steps of each scheduler.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        progress: float,
        budget: RunBudget | None = None,
        step_offset: int = 0,
        counting: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._trainer = trainer
        self._counting = counting
        self._step_offset = step_offset
        self._epoch_ends: list[float] = []
        self._epochs: tuple[EpochSteps, ...] = ()
        self._configs = [
            config
            for config in trainer.strategy.lr_scheduler_configs
            if trainer.lightning_module.automatic_optimization
            and not config.reduce_on_plateau
            and not (config.interval == "epoch" and trainer.num_training_batches == math.inf)
        ]
        self._frequencies = [config.frequency for config in self._configs]
        if budget is not None:
            self.replan(budget)
        # A restored scheduler may have followed rounds that were lost because they had not been pushed before the save.
        restored = [getattr(config.scheduler, "last_epoch", 0) if progress > 0 else 0 for config in self._configs]
        due = [self._due_steps(index, progress) if progress > 0 else 0 for index in range(len(self._configs))]
        self.step_counts = [max(counts) for counts in zip(due, restored, strict=True)]
        for config in self._configs:
            config.frequency = _NEVER

    def replan(self, budget: RunBudget) -> None:
        """Take the lengths of epochs from another budget."""
        self._epochs = budget.epochs
        self._epoch_ends = []

    def advance(self, progress: float) -> None:
        """Step every scheduler until it has followed ``progress``. If the progress is smaller, do nothing."""
        in_use = self._trainer.strategy.lr_scheduler_configs
        for index, config in enumerate(self._configs):
            if not any(config is current for current in in_use):
                continue  # A callback (SWA) has replaced this scheduler.
            for step in range(self.step_counts[index], self._due_steps(index, progress)):
                # The module's own hook may read trainer.global_step, so it must be that of the scheduler's step.
                by_steps = config.interval == "step"
                counted = (step + 1) * self._frequencies[index] if by_steps else math.floor(progress + TOLERANCE)
                with self._counting(counted):
                    step_scheduler(self._trainer, config.scheduler)
                self.step_counts[index] += 1

    def restore(self) -> None:
        """Let Lightning step the schedulers again."""
        for config, frequency in zip(self._configs, self._frequencies, strict=True):
            config.frequency = frequency
        self._configs = []
        self._frequencies = []

    def _due_steps(self, index: int, progress: float) -> int:
        """Return how many steps a scheduler must have taken."""
        progress += TOLERANCE
        done = progress if self._configs[index].interval == "step" else self._epochs_done(progress)
        return int(done // self._frequencies[index])

    def _epochs_done(self, progress: float) -> int:
        while not self._epoch_ends or self._epoch_ends[-1] <= progress:
            number = len(self._epoch_ends)
            is_planned = number < len(self._epochs)
            steps = self._epochs[number].steps_per_rank if is_planned else epoch_steps_per_rank(self._trainer, number)
            begin = self._epoch_ends[-1] if self._epoch_ends else self._step_offset
            self._epoch_ends.append(begin + max(1, steps))
        return bisect.bisect_right(self._epoch_ends, progress)
