"""A fit's training with virtual workers: as on a rank, with turns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_async_localsgd.counts import HAIR
from lightning_async_localsgd.simulation.inner import InnerStates, left_out
from lightning_async_localsgd.trainer_parts import torch_optimizer
from lightning_async_localsgd.training import AsyncTraining

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import lightning.pytorch as pl
    from lightning.pytorch.utilities.types import LRSchedulerConfig
    from torch.optim import Optimizer

    from lightning_async_localsgd.limits import LiftedLimits
    from lightning_async_localsgd.plan import RunBudget
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
        workers: inner states to go on with, by the workers' numbers.
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
        workers: Mapping[str, Any],
        on_cpu: bool,
    ) -> None:
        self._workers = workers
        self._on_cpu = on_cpu
        super().__init__(trainer, phase, data, limits, budget, restored)

    def _begin(self, restored: dict[str, Any] | None) -> None:
        trainer, phase = self._trainer, self.phase
        # A plain number: the trainer's own is one that nothing reaches while its limits are lifted.
        end = int(trainer.max_epochs or 0) if self._budget.ends_with_data else None
        self._data.attach(phase, self._retire, end)
        super()._begin(restored)
        configs = trainer.strategy.lr_scheduler_configs
        self._inner = InnerStates(
            [torch_optimizer(optimizer) for optimizer in trainer.strategy.optimizers],
            _following_a_metric(configs),
            [config.scheduler for config in configs if not _follows_a_metric(config)],
            self._schedulers,
            trainer.strategy.precision_plugin,
            lambda: left_out(phase.module, phase.binding.tensors()),
            self._on_cpu,
        )
        if self._workers:
            self._inner.load_state_dict(self._workers)
        self._forget_the_gone()
        self._begin_turn()
        self._inner.mark()  # Until its first batch: the first epoch begins.

    # ---------------------------------------------------------------- the loop

    def end_epoch(self) -> None:
        """An epoch of the trainer is over: what callbacks and the module do about it, live workers would all do."""
        self._inner.mark()

    def before_batch(self) -> None:
        """A batch is about to be trained on; called before any callback sees it."""
        self._inner.spread(last=True)
        super().before_batch()
        if not self._trainer.fit_loop._should_accumulate():
            worker = self.phase.worker
            worker.steps = max(worker.steps, math.floor(self.phase.next_progress_of_worker + HAIR))

    def end_step(self) -> None:
        """An optimizer step has been taken, or skipped."""
        if self.phase.stopped:
            return
        over = self.phase.end_step()
        # Known before the loop goes on, so that the last validation is of the final model.
        out = self._data.out_of_data(look=not over)
        self._follow()
        if over or out:
            self._turn(final=out)
        if self._over:
            # Who ends last need not have asked for more than there is: the others have retired meanwhile.
            self._data_ended = self._budget.ends_with_data and not self._trainer.should_stop
            if self._data_ended:
                self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
            self._follow()

    def finish(self) -> None:
        """Ends training if it has not ended yet, see :meth:`.AsyncTraining.finish`."""
        if not self.phase.stopped:
            self._inner.store()
            super().finish()
            self._inner.load(0)
            self._schedulers.advance(self._counts.steps)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the run, every worker's inner state included."""
        state = super().state_dict()
        return {**state, "simulation": {**self.phase.turns.state_dict(), "inner": self._inner.state_dict()}}

    # ---------------------------------------------------------------- internal

    @property
    def _over(self) -> bool:
        """Whether a turn was the last one."""
        return self.phase.stopped

    @property
    def _scheduled_steps(self) -> int:
        # Its own virtual time, not that of the last event, is what a worker's learning rate follows.
        return self._counts.steps if self.phase.stopped else self.phase.worker.steps

    def _retire(self) -> None:
        """The worker at turn has no data for another step."""
        self._turn(final=True)
        if self._over:
            self._data_ended = True
            self._follow()

    def _turn(self, final: bool) -> None:
        """The turn of a worker is over; those that have no data for theirs pass it on."""
        self._inner.store()
        self.phase.next_turn(final)
        while not self._over and self._budget.ends_with_data and not self._data.has_data(self.phase.worker):
            self.phase.next_turn(final=True)
        self._forget_the_gone()
        if self._over:
            self._inner.load(0)  # Of what is not exchanged a run leaves behind what worker 0 has.
        else:
            self._begin_turn()

    def _forget_the_gone(self) -> None:
        # Of what is not exchanged a run leaves behind what worker 0 has, though it be gone.
        self._inner.forget(self.phase.turns.gone - {0})

    def _begin_turn(self) -> None:
        worker = self.phase.worker
        self._inner.load(worker.number)
        if worker.round == 1:
            # A worker that joins later is where the others are.
            worker.steps = max(worker.steps, math.floor(self.phase.progress_of_worker + HAIR))
            self._schedulers.advance(worker.steps)
        self._adapt_optimizers()


def _follows_a_metric(config: LRSchedulerConfig) -> bool:
    # With manual optimization Lightning does not say so.
    return config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau)


def _following_a_metric(configs: Sequence[LRSchedulerConfig]) -> list[Optimizer]:
    """The optimizers whose learning rates follow a metric, which is that of the run and not a worker's own.

    Raises:
        ValueError: another scheduler, which follows a worker's progress, changes the rates of such an optimizer, too.

    """
    found = [config.scheduler.optimizer for config in configs if _follows_a_metric(config)]
    for config in configs:
        if not _follows_a_metric(config) and any(config.scheduler.optimizer is one for one in found):
            raise ValueError(
                f"ReduceLROnPlateau and {type(config.scheduler).__name__} change the learning rates of one optimizer; "
                "in a simulated cluster the first does so for all workers at once and the second for each at its own "
                "time; keep one of them"
            )
    return found
