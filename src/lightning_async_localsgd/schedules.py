"""Learning-rate schedulers that follow the progress of the data, not of one worker's own steps.

Lightning steps a scheduler once for every local step, or epoch, of its rank. With workers of unequal speed a fast one
would run through the schedule early and a slow one stay behind. So, while ranks run asynchronously, schedulers are
stepped here: as often as there have been local steps of all workers together, divided by the number of workers (the
paper's equation 3, over the whole run). A merge never restarts them.
"""

from __future__ import annotations

import bisect
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer import call

from lightning_async_localsgd.counts import HAIR
from lightning_async_localsgd.limits import planned_steps

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import lightning.pytorch as pl

    from lightning_async_localsgd.plan import EpochSteps, RunBudget

_NEVER = 2**62
"""A frequency at which Lightning never gets to step a scheduler itself."""


class ProgressSchedulers:
    """Takes over the schedulers of a trainer until :meth:`release`.

    Step-wise schedulers follow the progress in steps. Epoch-wise ones follow it in epochs, where an epoch has a known
    number of steps; otherwise they stay with Lightning and follow the rank's own epochs. Under manual optimization the
    module steps its schedulers itself.

    Args:
        trainer: the trainer, its schedulers restored if it resumes.
        progress: local steps of all workers / number of workers that the schedulers have already seen.
        budget: of the run.
        ahead: steps in the progress that are none of this run's as it is planned now, see :func:`.steps_ahead`.
        counted_as: while it lasts the trainer says that it has taken so many steps.

    Attributes:
        taken: steps that each scheduler has been given.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        progress: float,
        budget: RunBudget | None = None,
        ahead: int = 0,
        counted_as: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._trainer = trainer
        self._counted_as = counted_as
        self._ahead = ahead
        self._ends: list[float] = []
        self._planned: tuple[EpochSteps, ...] = ()
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
        # A restored scheduler has also seen rounds that had not been handed in when it was saved, and are lost.
        seen = [getattr(config.scheduler, "last_epoch", 0) if progress > 0 else 0 for config in self._configs]
        due = [self._due(index, progress) if progress > 0 else 0 for index in range(len(self._configs))]
        self.taken = [max(one, n) for one, n in zip(due, seen, strict=True)]
        for config in self._configs:
            config.frequency = _NEVER

    def replan(self, budget: RunBudget) -> None:
        """Epochs are as long as ``budget`` says."""
        self._planned = budget.epochs
        self._ends = []

    def advance(self, progress: float) -> None:
        """Steps every scheduler as often as ``progress`` asks for. Going back is not possible and does nothing."""
        in_use = self._trainer.strategy.lr_scheduler_configs
        for index, config in enumerate(self._configs):
            if not any(config is one for one in in_use):
                continue  # A callback (SWA) has put a scheduler of its own in this one's place.
            for taken in range(self.taken[index], self._due(index, progress)):
                # A module's own hook may look at the trainer's count, which is ahead where it catches up with others.
                by_steps = config.interval == "step"
                counted = (taken + 1) * self._frequencies[index] if by_steps else math.floor(progress + HAIR)
                with self._counted_as(counted):
                    call._call_lightning_module_hook(self._trainer, "lr_scheduler_step", config.scheduler, None)
                self.taken[index] += 1

    def _due(self, index: int, progress: float) -> int:
        """Steps that a scheduler is to have been given."""
        done = progress + HAIR if self._configs[index].interval == "step" else self._epochs(progress + HAIR)
        return int(done // self._frequencies[index])

    def _epochs(self, progress: float) -> int:
        """Epochs that are over."""
        while not self._ends or self._ends[-1] <= progress:
            number = len(self._ends)
            known = number < len(self._planned)
            steps = self._planned[number].planned if known else planned_steps(self._trainer, number)
            self._ends.append((self._ends[-1] if self._ends else self._ahead) + max(1, steps))
        return bisect.bisect_right(self._ends, progress)

    def release(self) -> None:
        """Gives the schedulers back to Lightning."""
        for config, frequency in zip(self._configs, self._frequencies, strict=True):
            config.frequency = frequency
        self._configs = []
        self._frequencies = []
