"""Asynchronous training on one rank: what happens at the hooks of the training loop."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.lightning.checkpoints.optimizer_states import OptimizerStateSaver
from lightning_async_localsgd.lightning.checkpoints.periodic import PeriodicCheckpoints
from lightning_async_localsgd.lightning.checkpoints.worker_files import WorkerStateCollector
from lightning_async_localsgd.lightning.data.batch_sizes import batch_size, batch_tokens
from lightning_async_localsgd.lightning.loop.averaging import GlobalAverages
from lightning_async_localsgd.lightning.loop.collective_warnings import CollectiveWarnings
from lightning_async_localsgd.lightning.loop.counters import GlobalStepCounters
from lightning_async_localsgd.lightning.loop.delegated_validations import DelegatedValidations
from lightning_async_localsgd.lightning.loop.limits import epoch_steps, has_minimum, steps_of_an_optimizer
from lightning_async_localsgd.lightning.loop.metric_sync import MetricSync
from lightning_async_localsgd.lightning.loop.optimizer_reset import reset_after_adoption, torch_optimizer
from lightning_async_localsgd.lightning.loop.progress_bar import GlobalProgressBar
from lightning_async_localsgd.lightning.loop.rank_zero_callbacks import RestingCallbacks
from lightning_async_localsgd.lightning.loop.schedules import ProgressSchedulers
from lightning_async_localsgd.lightning.loop.step_counting import StepCounter
from lightning_async_localsgd.lightning.loop.synchronous_steps import SynchronousSteps
from lightning_async_localsgd.lightning.loop.unchanged_validations import UnchangedValidations
from lightning_async_localsgd.lightning.trainer_access.loop import can_stop_early, should_accumulate
from lightning_async_localsgd.lightning.trainer_access.strategy import strategy_of
from lightning_async_localsgd.policies.plan import RunBudget
from lightning_async_localsgd.runtime.global_steps import TOLERANCE

if TYPE_CHECKING:
    from datetime import timedelta

    import lightning.pytorch as pl

    from lightning_async_localsgd.launch.joining import JoinGrant
    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.lightning.data.training_data import TrainingData
    from lightning_async_localsgd.lightning.loop.limits import SuspendedLimits
    from lightning_async_localsgd.runtime.base import Runtime


_OPTIMIZER_STATES = "optimizer states"
"""Topic under which ranks post the names of their files after training."""


class FitController:
    """Drive asynchronous training from the strategy's hooks, until :meth:`restore_trainer`.

    The constructor changes the trainer: its limits, counters, schedulers, metrics and callbacks are those of the whole
    run while ranks run at their own speed.

    Args:
        trainer: the trainer, before its first batch.
        runtime: this rank's part in asynchronous training.
        data: the training data.
        limits: the trainer's suspended limits; restored at the end.
        budget: the run's budget.
        restored: state of a single worker's training data, see :meth:`.TrainingData.state_dict`.
        grant: the server's answer to a worker that joins a running training; None for other workers.
        checkpoint_every: interval of the run's own checkpoints.

    Attributes:
        runtime: this rank's part in asynchronous training.
        collective_warnings: warns about collectives that are local; None if the run has a single process.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        runtime: Runtime,
        data: TrainingData,
        limits: SuspendedLimits,
        budget: RunBudget,
        restored: dict[str, Any] | None,
        grant: JoinGrant | None = None,
        checkpoint_every: int | timedelta | None = None,
    ) -> None:
        self.runtime = runtime
        self._grant = grant
        self._checkpoint_every = checkpoint_every
        self.collective_warnings: CollectiveWarnings | None = None
        self._trainer = trainer
        self._data = data
        self._limits = limits
        self._budget = budget
        self._data_ended = False
        self._metric_sync: MetricSync | None = None
        self._state_saver: OptimizerStateSaver | None = None
        self._state_collector: WorkerStateCollector | None = None
        self._unchanged_validations: UnchangedValidations | None = None
        self._delegated: DelegatedValidations | None = None
        self._restores = ExitStack()
        try:
            self._change_trainer(restored)
        except BaseException:
            self.restore_trainer()
            raise

    def _change_trainer(self, restored: dict[str, Any] | None) -> None:
        """Change the trainer. Changes are undone in reverse order."""
        trainer, runtime, restores = self._trainer, self.runtime, self._restores
        restores.callback(self._limits.restore)
        if self._budget.ends_with_data:
            self._limits.keep_epochs()
        if not trainer.is_global_zero:
            # Ranks above 0 neither validate nor save.
            trainer.limit_val_batches = 0
            restores.callback(RestingCallbacks(trainer).restore)
        restores.callback(self._data.end)
        restores.callback(self._data.accumulate_own())
        if self._grant is not None:
            self._set_epoch(self._grant.info.epoch)
        self._data.begin(runtime.lease_buffer, restored)
        if trainer.is_global_zero:
            restores.callback(GlobalAverages(trainer, runtime, self._data.global_epochs, self._budget).restore)
        self._counters = GlobalStepCounters(trainer, runtime, self._data)
        restores.callback(self._counters.restore)
        if not runtime.single_process:
            self._metric_sync = MetricSync(trainer, runtime)
            restores.callback(self._metric_sync.restore)
            self.collective_warnings = CollectiveWarnings(trainer)
        # The schedules in a checkpoint are at the trainer's steps. Merged rounds may be ahead of them.
        steps_done = steps_of_an_optimizer(trainer) if self._grant is None else 0
        self._schedulers = ProgressSchedulers(
            trainer, steps_done, self._budget, runtime.step_offset, self._counters.counting
        )
        restores.callback(self._schedulers.restore)
        # A worker that joins begins at the run's progress. Training may also have ended before this rank's first step.
        if runtime.stopped or self._grant is not None:
            with warnings.catch_warnings():
                # Other workers have taken the optimizer steps that torch misses here.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self._apply_progress()
        self.synchronous_steps = self._make_synchronous_steps()
        restores.callback(self.synchronous_steps.restore)
        optimizer = torch_optimizer(trainer.strategy.optimizers[0])
        self._step_counter = StepCounter(optimizer, self._count_step)
        restores.callback(self._step_counter.close)
        if trainer.is_global_zero:
            self._unchanged_validations = UnchangedValidations(trainer, runtime)
            restores.callback(self._unchanged_validations.restore)
            if runtime.may_have_evaluator:
                self._delegated = DelegatedValidations(
                    trainer, runtime, self._bring_up_to_date, self._unchanged_validations.begin, self.end_validation
                )
                restores.callback(self._delegated.restore)
            restores.callback(PeriodicCheckpoints(trainer, runtime, self._checkpoint_every).close)
            if runtime.server is not None and not runtime.single_process and self._checkpoint_every is not None:
                self._state_collector = WorkerStateCollector(runtime.server)
        else:
            joins, resumed_file = self._grant is not None, strategy_of(trainer).optimizer_file
            self._state_saver = OptimizerStateSaver(trainer, runtime, self._checkpoint_every, joins, resumed_file)
            restores.callback(self._state_saver.close)
        if runtime.server is not None:
            restores.callback(GlobalProgressBar(trainer, runtime).restore)

    # ---------------------------------------------------------------- the loop

    @property
    def ends_with_this_epoch(self) -> bool:
        """Whether the run ends with the last batch of this rank's current epoch."""
        return self._budget.ends_with_data and self._trainer.current_epoch + 1 >= (self._trainer.max_epochs or 0)

    def before_epoch(self) -> None:
        """Prepare an epoch of this rank. Its data loaders are set up."""
        if self._data.prepare():
            self._replan()
        self.runtime.begin_epoch(self._trainer.current_epoch)
        self._counters.before_epoch()

    def after_epoch(self) -> None:
        """End training if the loop ends with this epoch. Callbacks have not run their hooks for its end yet.

        Raises:
            RuntimeError: The epoch had no batch, but the budget is not used up.

        """
        trainer = self._trainer
        is_empty = trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0
        # If data is leased, other ranks may have used up an epoch before a slow rank gets a batch of it.
        if is_empty and not self._data.global_epochs and not trainer.should_stop:
            raise RuntimeError(
                f"the training data of rank {trainer.global_rank} gave no batch in epoch {trainer.current_epoch}, but "
                "the budget is not used up. The data can be read only once, or has fewer shards than there are ranks; "
                "make it iterable again, or lower max_steps."
            )
        # If the loop ends by itself, all ranks push their work before the final checkpoints are saved.
        if (trainer.should_stop and can_stop_early(trainer)) or self.ends_with_this_epoch:
            self.finish()

    def before_batch(self) -> None:
        """Update the counters before a batch. Callbacks have not seen the batch yet."""
        self.synchronous_steps.before_batch()
        self._counters.before_batch()

    def count_batch(self, batch: Any) -> None:
        """Count the samples of a batch. All callbacks have seen the batch, and training on it is next."""
        samples = self._data.count_batch(batch)
        self.runtime.count_batch(batch_size(batch) if samples is None else samples, batch_tokens(batch))

    def average_gradients(self) -> None:
        """In the synchronous beginning, average the gradients of all ranks. The optimizer's step is next."""
        if self.synchronous_steps.on:
            self.synchronous_steps.average()
            if self._metric_sync is not None:
                self._metric_sync.receive()  # All ranks take the step with the same learning rates.

    def end_step(self) -> None:
        """End an optimizer step, which a gradient scaler may have skipped."""
        if self.runtime.stopped:
            return
        is_synchronous = self.synchronous_steps.on
        adopted = self.runtime.end_synchronous_step() if is_synchronous else self.runtime.end_step()
        is_last_batch = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.ends_with_this_epoch and is_last_batch and not self.runtime.stopped:
            # All ranks wait here for each other, so that the final model is validated and saved.
            self._data_ended = adopted = True
            self.runtime.finish(stop=False)
        if adopted:
            self._adapt_to_adopted_model()
        self._apply_progress(exact=is_synchronous)

    def after_batch(self) -> None:
        """Update the counters after a batch. Callbacks have not run their hooks for its end yet."""
        self._step_counter.end_batch()
        self.synchronous_steps.after_batch(stepped=not should_accumulate(self._trainer))
        self._counters.after_batch()
        if self._delegated is not None:
            self._delegated.poll()
        if self.runtime.stop_requested:
            self._trainer.should_stop = True  # Lightning still waits until min_epochs and min_steps are met.

    def flush_round(self) -> None:
        """Merge what a single worker has learned, before the global model is validated or saved."""
        if self.runtime.flush_round():
            self._reset_optimizers()
            self._apply_progress()

    def begin_validation(self) -> None:
        """Bring the global model up to date, and load it into the module."""
        if self._delegated is not None and (request := self._delegated.repeated) is not None:
            self.runtime.show_global_model(request.buffer.tensor, request.version)
            return
        self._bring_up_to_date()
        self.runtime.show_global_model()
        if self._unchanged_validations is not None:
            self._unchanged_validations.begin(self.runtime.shown_version)

    def end_validation(self, validated: dict[str, Any] | None = None) -> None:
        """Share rank 0's validation metrics, and stop training if a callback has asked for it.

        Args:
            validated: the metrics in JSON's types if the evaluator has validated; None if rank 0 has.

        """
        if self._metric_sync is not None:
            self._metric_sync.end_validation(validated)
        trainer = self._trainer
        if trainer.should_stop and can_stop_early(trainer) and not self.runtime.stopped:
            self.runtime.request_stop()

    def finish(self) -> None:
        """End training if it is still running. The module then holds the final global model.

        This rank's loop has ended by itself. If its data has ended, the other ranks continue until theirs ends.
        Otherwise ``trainer.should_stop`` ends training on all ranks.
        """
        if not self.runtime.stopped:
            self._data_ended = self._budget.ends_with_data and not self._trainer.should_stop
            if self._grant is not None and self._grant.late_joiner and not self._data_ended:
                self.runtime.leave()  # Other ranks need not stop because a late joiner does.
            else:
                # A rank above 0 only estimates the progress of others, and its epochs may be later ones than rank 0's.
                # Therefore rank 0 decides whether a minimum is met.
                if not (self._data_ended or self._trainer.is_global_zero) and has_minimum(self._trainer):
                    self.runtime.finish_and_request_stop()
                else:
                    self.runtime.finish(stop=not self._data_ended)
            self._apply_progress()
        if self._delegated is not None:
            self._delegated.end()

    # ----------------------------------------------------------- optimizer states

    def request_saves(self, checkpoint: Any, state: dict[str, Any]) -> None:
        """Ask workers to save the optimizer states that belong to a checkpoint that rank 0 has written."""
        if self._state_collector is not None:
            self._state_collector.request(checkpoint, state)

    def discard_checkpoint(self, checkpoint: Any) -> None:
        """Collect no more optimizer states for a checkpoint that rank 0 has removed."""
        if self._state_collector is not None:
            self._state_collector.discard(checkpoint)

    def save_optimizer_states(self, rendezvous: Rendezvous) -> None:
        """Save workers' optimizer states after training, if they belong to checkpoints. Every rank calls this."""
        needed = rendezvous.broadcast(self._state_collector is not None and self._state_collector.requests > 0)
        if needed and self._state_saver is not None:
            rendezvous.post(_OPTIMIZER_STATES, self._state_saver.finish())

    def gather_optimizer_states(self, rendezvous: Rendezvous) -> None:
        """Keep the states that :meth:`save_optimizer_states` has saved with rank 0's checkpoints."""
        server = self.runtime.server
        if self._state_collector is None or server is None or not self._state_collector.requests:
            return
        names = {worker: name for worker, name in rendezvous.posted(_OPTIMIZER_STATES).items() if name}
        server.add_optimizer_files(names)
        self._state_collector.finish(names)

    # ----------------------------------------------------------------- the end

    def synchronize(self, rendezvous: Rendezvous) -> None:
        """Give all ranks rank 0's step count, learning rates and metrics, after training."""
        if self._metric_sync is not None:
            self._metric_sync.synchronize(rendezvous)
        self._counters.set_steps(rendezvous.broadcast(self._counters.steps))
        self._data.check_duplicates()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run for a checkpoint, on rank 0."""
        state = self.runtime.state_dict()
        if self.runtime.single_process:
            state["training_data"] = self._data.state_dict()
        return state

    def restore_trainer(self) -> None:
        """Undo all changes to the trainer. Further calls do nothing."""
        self._restores.close()
        self.collective_warnings = None

    # ---------------------------------------------------------------- internal

    def _set_epoch(self, epoch: int) -> None:
        """Begin with the epoch in which the other ranks are."""
        progress = self._trainer.fit_loop.epoch_progress
        for counts in (progress.total, progress.current):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, epoch)

    def _replan(self) -> None:
        """Adapt the budget to reloaded data, whose epochs may be longer or shorter."""
        trainer, epochs = self._trainer, self._budget.epochs
        remaining = epoch_steps(trainer, self._data, range(trainer.current_epoch, len(epochs)))
        if remaining and remaining != list(epochs[trainer.current_epoch :]):
            self._budget = RunBudget.of_epochs([*epochs[: trainer.current_epoch], *remaining], self._budget.unit)
            self.runtime.replan(self._budget)
            self._schedulers.replan(self._budget)

    @property
    def _scheduled_steps(self) -> int:
        """Global steps that schedulers must have followed."""
        return self._counters.steps

    def _bring_up_to_date(self) -> None:
        """Bring the global model up to date before it is validated."""
        self.flush_round()
        if self.runtime.recall_rounds():
            self._end_recalled_round()

    def _make_synchronous_steps(self) -> SynchronousSteps:
        return SynchronousSteps(self._trainer, self.runtime)

    def _count_step(self) -> None:
        if not self.runtime.worker.synchronous:  # Otherwise its gradients have been counted.
            self.runtime.worker.count_step()

    def _end_recalled_round(self) -> None:
        self.runtime.end_round()
        self._adapt_to_adopted_model()
        self._apply_progress()

    def _adapt_to_adopted_model(self) -> None:
        self._reset_optimizers()
        if self._state_collector is not None:
            self._state_collector.collect()

    def _reset_optimizers(self) -> None:
        """Adapt the inner optimizers to adopted weights, which the optimizers have not reached themselves."""
        if not self.runtime.keeps_weights:
            for optimizer in self._trainer.strategy.optimizers:
                reset_after_adoption(
                    torch_optimizer(optimizer), self.runtime.worker.diverged, self.runtime.worker.optimizer_reset
                )

    def _apply_progress(self, exact: bool = False) -> None:
        """Step schedulers up to the current progress, and end the trainer's loop if training has ended.

        Args:
            exact: whether a synchronous step has ended. Its schedules follow the steps that the server has counted, so
                that all ranks have the same learning rates. Ranks may estimate differently.

        """
        if self.runtime.stopped:
            self._counters.finish()
        steps = math.floor(self.runtime.global_steps + TOLERANCE) if exact else self._scheduled_steps
        self._schedulers.advance(steps)
        if self._metric_sync is not None:
            self._metric_sync.receive()
        if self.runtime.stopped:
            budget = self._budget
            steps_used = budget.limit == "max_steps" and self.runtime.global_steps >= (budget.steps_per_rank or 0)
            self._limits.end_training(limit_reached=self._data_ended or steps_used)
