"""Drives Lightning's loop with virtual workers, which take turns at computing their rounds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_async_localsgd.lightning.loop.controller import FitController
from lightning_async_localsgd.lightning.loop.optimizer_reset import torch_optimizer
from lightning_async_localsgd.lightning.simulated.synchronous_steps import SimulatedSynchronousSteps
from lightning_async_localsgd.lightning.simulated.worker_states import WorkerStates, unexchanged_buffers
from lightning_async_localsgd.lightning.trainer_access.loop import should_accumulate
from lightning_async_localsgd.runtime.global_steps import TOLERANCE
from lightning_async_localsgd.runtime.sync_state import set_buffer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

    import lightning.pytorch as pl
    from lightning.pytorch.utilities.types import LRSchedulerConfig
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_async_localsgd.lightning.loop.limits import SuspendedLimits
    from lightning_async_localsgd.lightning.loop.synchronous_steps import SynchronousSteps
    from lightning_async_localsgd.lightning.simulated.data import SimulatedData
    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.simulation.runtime import SimulatedRuntime


class SimulatedFitController(FitController):
    """Handles the strategy's hooks during a simulated run.

    Args:
        trainer: the trainer, before its first batch.
        runtime: the virtual workers.
        data: the training data.
        limits: the trainer's suspended limits, which are restored at the end.
        budget: local steps that these limits allow.
        restored: state of the training data to resume from, see :meth:`.TrainingData.state_dict`.
        worker_states: states of the workers to resume from, see :meth:`.WorkerStates.state_dict`.
        on_cpu: whether the states of workers that are not the current one are kept in the host's memory.
        checkpoint_every: interval of the run's own checkpoints.

    """

    runtime: SimulatedRuntime
    _data: SimulatedData

    def __init__(
        self,
        trainer: pl.Trainer,
        runtime: SimulatedRuntime,
        data: SimulatedData,
        limits: SuspendedLimits,
        budget: RunBudget,
        restored: dict[str, Any] | None,
        worker_states: Mapping[str, Any],
        on_cpu: bool,
        checkpoint_every: int | timedelta | None,
    ) -> None:
        self._restored_states = worker_states
        self._on_cpu = on_cpu
        super().__init__(trainer, runtime, data, limits, budget, restored, None, checkpoint_every)

    @override
    def _change_trainer(self, restored: dict[str, Any] | None) -> None:
        trainer, runtime = self._trainer, self.runtime
        # A plain number: the trainer's own max_epochs is a suspended limit, which compares as unreachable.
        epochs = int(trainer.max_epochs or 0) if self._budget.ends_with_data else None
        self._data.attach(runtime, self._on_exhausted, epochs)
        super()._change_trainer(restored)
        weights = runtime.optimizer_weights
        assert weights is not None
        self._optimizer_weights = weights
        configs = trainer.strategy.lr_scheduler_configs
        self._worker_states = WorkerStates(
            [torch_optimizer(optimizer) for optimizer in trainer.strategy.optimizers],
            _optimizers_with_plateau(configs),
            [config.scheduler for config in configs if not _is_plateau(config)],
            self._schedulers,
            trainer.strategy.precision_plugin,
            lambda: unexchanged_buffers(runtime.module, runtime.binding.tensors()),
            lambda name, value: set_buffer(runtime.module, name, value),
            self._exchanged_value,
            self._on_cpu,
        )
        if self._restored_states:
            self._worker_states.load_state_dict(self._restored_states)
        self._step_buffers: dict[str, Tensor] = {}
        self._drop_lost_workers()
        self._begin_round()
        self._worker_states.begin_shared_hooks()  # The hooks before the first batch: the first epoch begins.

    # ---------------------------------------------------------------- the loop

    @override
    def after_epoch(self) -> None:
        # Live workers would all call the hooks at the end of an epoch.
        self._worker_states.begin_shared_hooks()
        super().after_epoch()

    @override
    def _make_synchronous_steps(self) -> SynchronousSteps:
        return SimulatedSynchronousSteps(self._trainer, self.runtime, self._data, self._begin_contribution)

    @override
    def before_batch(self) -> None:
        self._worker_states.share_changes(end=True)
        super().before_batch()
        if self.runtime.worker.synchronous:
            return  # All workers follow the steps that the server has counted.
        if not should_accumulate(self._trainer):
            worker = self.runtime.worker
            worker.scheduler_steps = max(worker.scheduler_steps, self._step_of_worker())

    @override
    def end_step(self) -> None:
        if self.runtime.stopped:
            return
        if self.runtime.worker.synchronous:
            self._end_synchronous_step()
            return
        reply = self.runtime.worker.reply
        over = self.runtime.end_step()
        if self.runtime.worker.reply is not reply:
            self._reset_optimizers()  # With overlap, a model was adopted in the middle of the round.
        # This must be known before the loop continues, so that the last validation is of the final model.
        exhausted = self._data.exhausted(fetch=not over)
        self._apply_progress()
        if (over or exhausted) and self._next_round(final=exhausted):
            # `exhausted` may be False: the last worker need not have requested more data than there was, if the other
            # workers have run out of data before.
            self._data_ended = self._budget.ends_with_data and not self._trainer.should_stop
            if self._data_ended:
                self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
            self._apply_progress()

    @override
    def finish(self) -> None:
        if not self.runtime.stopped:
            self._leave_weights()
            self._share_synchronous_state()
            super().finish()
            self._load_last_state()
            self._schedulers.advance(self._counters.steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        left = self._leave_weights()
        simulation = {**self.runtime.simulator.state_dict(), "workers": self._worker_states.state_dict()}
        if left:
            self._arrive_at_weights()
        return {**state, "simulation": simulation}

    # ---------------------------------------------------------------- internal

    @property
    @override
    def _scheduled_steps(self) -> int:
        # A worker's learning rate follows its own virtual time, not the time of the last event.
        return self._counters.steps if self.runtime.stopped else self.runtime.worker.scheduler_steps

    def _step_of_worker(self) -> int:
        """Return the global step to which the current batch belongs for its worker, at the worker's virtual time."""
        estimate = self.runtime.next_global_steps_of_worker
        if self.runtime.replays_live_run and self._data.global_epochs:
            # A live worker knows its epoch, and whether the batch is its last one of the epoch.
            epoch, is_last = self._data.place_of_batch()
            axis, worker = self._counters.axis, self.runtime.worker
            if worker.number == 0:
                position = self._data.position_of_batch(epoch)
                return axis.step_of_host(worker.scheduler_steps, estimate, epoch, is_last, position)
            return axis.step_of(worker.scheduler_steps, estimate, epoch, is_last)
        return math.floor(estimate + TOLERANCE)

    def _on_exhausted(self) -> None:
        """Handle that the current worker has no data for another step."""
        if self._next_round(final=True):
            self._data_ended = True
            self._apply_progress()

    @override
    def _end_recalled_round(self) -> None:
        self._next_round(final=False)
        self._apply_progress()

    def _next_round(self, final: bool) -> bool:
        """Push the current worker's round, and begin the round of the next worker that has data.

        Args:
            final: whether the current worker has no more data.

        Returns:
            Whether training has ended.

        """
        runtime = self.runtime
        self._leave_weights()
        self._share_synchronous_state()
        runtime.next_round(final)
        while not runtime.stopped and self._budget.ends_with_data and not self._data.has_data(runtime.worker):
            runtime.next_round(final=True)
        self._drop_lost_workers()
        if runtime.stopped:
            self._load_last_state()
        elif runtime.worker.synchronous:
            self._arrive_at_weights()
            self._begin_contribution()
        else:
            self._begin_round()
        return runtime.stopped

    def _end_synchronous_step(self) -> None:
        """End an optimizer step that all workers have taken. Then another step begins, or the first rounds."""
        is_last = self.runtime.end_synchronous_step()
        self._apply_progress(exact=True)
        simulator = self.runtime.simulator
        for number in simulator.members:
            simulator.live[number].scheduler_steps = math.floor(self.runtime.global_steps + TOLERANCE)
        if is_last:
            if self._next_round(final=False):
                self._data_ended = self._budget.ends_with_data and not self._trainer.should_stop
                self._apply_progress()
            return
        self.runtime.begin_next_round()
        self._note_step_buffers()

    def _note_step_buffers(self) -> None:
        runtime = self.runtime
        unexchanged = unexchanged_buffers(runtime.module, runtime.binding.tensors())
        self._step_buffers = {name: buffer.clone() for name, buffer in unexchanged.items()}

    def _begin_contribution(self) -> None:
        """Give the current worker the buffers with which all workers begin the step."""
        self.runtime.restore_buffers()
        for name, value in self._step_buffers.items():
            set_buffer(self.runtime.module, name, value)

    def _share_synchronous_state(self) -> None:
        """In the synchronous beginning, give all workers the state that all of them have reached."""
        if self.runtime.worker.synchronous:
            self._worker_states.share({0, *self.runtime.simulator.members})

    def _exchanged_value(self, buffer: str) -> Tensor | None:
        layout = self.runtime.binding.layout
        return layout.views(self.runtime.worker.model, "buffer").get(buffer)

    def _leave_weights(self) -> bool:
        """Put the weights that the current worker's optimizers show into the module, and store the worker's state.

        Returns:
            Whether the worker's optimizers had not left its weights before.

        """
        states, begins = self._worker_states, self._worker_states.left is None
        if begins:
            states.left = self._optimizer_weights.leave()
        states.store()
        return begins

    def _arrive_at_weights(self) -> None:
        """Let the current worker's optimizers continue from the weights in the module."""
        states = self._worker_states
        if states.left is not None:
            self._optimizer_weights.arrive(states.left)
            states.left = None

    def _load_last_state(self) -> None:
        """Load the state that is not exchanged at the end of a run, which is that of worker 0."""
        states = self._worker_states
        states.load(0)
        if states.left is not None:
            # The module keeps the weights that the optimizers show.
            self._optimizer_weights.arrive()
            states.left = None

    def _drop_lost_workers(self) -> None:
        # The state of worker 0 is needed at the end, even if that worker is lost.
        self._worker_states.drop(self.runtime.simulator.permanently_lost - {0})

    def _begin_round(self) -> None:
        worker = self.runtime.worker
        self._worker_states.load(worker.number)
        self._arrive_at_weights()
        if worker.synchronous:
            self._note_step_buffers()
        if worker.reply is not worker.pending_reply:
            return  # With overlap, the worker continues from its local model.
        worker.load_moments()
        if worker.round == 1:
            # A worker that joins later begins where the others are.
            steps = math.floor(self.runtime.global_steps_of_worker + TOLERANCE)
            worker.scheduler_steps = max(worker.scheduler_steps, steps)
            self._schedulers.advance(worker.scheduler_steps)
        self._reset_optimizers()


def _is_plateau(config: LRSchedulerConfig) -> bool:
    # With manual optimization, Lightning does not set the flag.
    return config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau)


def _optimizers_with_plateau(configs: Sequence[LRSchedulerConfig]) -> list[Optimizer]:
    """Return the optimizers whose learning rates follow a metric, which is a metric of the whole run.

    Raises:
        ValueError: A scheduler that follows a worker's progress also changes the rates of such an optimizer.

    """
    optimizers = [config.scheduler.optimizer for config in configs if _is_plateau(config)]
    for config in configs:
        shared = any(config.scheduler.optimizer is optimizer for optimizer in optimizers)
        if shared and not _is_plateau(config):
            raise ValueError(
                f"ReduceLROnPlateau and {type(config.scheduler).__name__} change the learning rates of the same "
                "optimizer; in a simulated cluster, the first changes the rates of all workers at once and the second "
                "those of each worker at its own time, so keep only one of them"
            )
    return optimizers
