"""A fit's training with virtual workers: as on a rank, with turns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.counts import HAIR
from lightning_async_localsgd.simulation.inner import InnerStates, left_out
from lightning_async_localsgd.trainer_parts import torch_optimizer
from lightning_async_localsgd.training import AsyncTraining

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.limits import LiftedLimits, RunBudget
    from lightning_async_localsgd.simulation.data import SimulatedData
    from lightning_async_localsgd.simulation.phase import SimulatedPhase


class SimulatedTraining(AsyncTraining):
    """What the strategy's hooks come to while virtual workers take turns.

    Args:
        trainer: the trainer, about to run its first batch.
        phase: just begun.
        data: the training data.
        limits: the trainer's limits, lifted; given back at the end.
        budget: what these limits come to.
        restored: see :meth:`.TrainingData.state_dict`.
        on_cpu: whether inner states are kept in the host's memory.

    """

    phase: SimulatedPhase
    _data: SimulatedData

    def __init__(
        self,
        trainer: pl.Trainer,
        phase: SimulatedPhase,
        data: SimulatedData,
        limits: LiftedLimits,
        budget: RunBudget,
        restored: dict[str, Any] | None,
        on_cpu: bool,
    ) -> None:
        self._on_cpu = on_cpu
        super().__init__(trainer, phase, data, limits, budget, restored)

    def _begin(self, restored: dict[str, Any] | None) -> None:
        trainer, phase = self._trainer, self.phase
        self._data.attach(phase, self._retire, trainer.max_epochs if self._budget.ends_with_data else None)
        super()._begin(restored)
        configs = trainer.strategy.lr_scheduler_configs
        self._inner = InnerStates(
            [torch_optimizer(optimizer) for optimizer in trainer.strategy.optimizers],
            [config.scheduler for config in configs if not config.reduce_on_plateau],
            self._schedulers,
            trainer.strategy.precision_plugin,
            left_out(phase.module, phase.binding.tensors()),
            self._on_cpu,
        )
        self._begin_turn()

    # ---------------------------------------------------------------- the loop

    def before_batch(self) -> None:
        """A batch is about to be trained on; called before any callback sees it."""
        super().before_batch()
        if not self._trainer.fit_loop._should_accumulate():
            worker = self.phase.worker
            worker.steps = max(worker.steps, math.floor(self.phase.next_progress_of_worker + HAIR))

    def end_step(self) -> None:
        """An optimizer step has been taken, or skipped."""
        if self.phase.stopped:
            return
        over, out = self.phase.end_step(), self._data.out_of_data
        self._follow()
        if over or out:
            self._turn(final=out)
        if self._over:
            self._data_ended = out
            self._follow()

    # ---------------------------------------------------------------- internal

    @property
    def _over(self) -> bool:
        """Whether a turn was the last one."""
        return self.phase.stopped

    @property
    def _scheduled_steps(self) -> int:
        # Its own virtual time, not that of the last event, is what a worker's learning rate follows.
        return self.phase.worker.steps

    def _retire(self) -> None:
        """The worker at turn has no data for another step."""
        self._turn(final=True)
        if self._over:
            self._data_ended = True
            self._follow()

    def _turn(self, final: bool) -> None:
        """The turn of a worker is over; those that have no data for theirs pass it on."""
        self._inner.store(self.phase.worker.number)
        self.phase.next_turn(final)
        while not self._over and self._budget.ends_with_data and not self._data.has_data(self.phase.worker):
            self.phase.next_turn(final=True)
        if not self._over:
            self._begin_turn()

    def _begin_turn(self) -> None:
        worker = self.phase.worker
        self._inner.load(worker.number)
        if worker.round == 1:
            # A worker that joins later is where the others are.
            worker.steps = max(worker.steps, math.floor(self.phase.progress_of_worker + HAIR))
            self._schedulers.advance(worker.steps)
        self._adapt_optimizers()
