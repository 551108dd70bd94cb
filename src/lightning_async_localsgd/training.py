"""A fit's asynchronous training on one rank: its phase, and what is held of the trainer while it lasts."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.agreement import Agreement
from lightning_async_localsgd.averaging import GlobalAverages
from lightning_async_localsgd.callback import AsyncLocalSGDCallback
from lightning_async_localsgd.companions import AwaitedStates
from lightning_async_localsgd.counts import GlobalCounts
from lightning_async_localsgd.inner_state import InnerStates
from lightning_async_localsgd.limits import epoch_steps, has_minimum
from lightning_async_localsgd.local_values import LocalValues
from lightning_async_localsgd.periodic import PeriodicCheckpoints
from lightning_async_localsgd.plan import RunBudget
from lightning_async_localsgd.run_folder import folder_of
from lightning_async_localsgd.schedules import ProgressSchedulers
from lightning_async_localsgd.trainer_parts import (
    RestingCallbacks,
    batch_size,
    batch_tokens,
    callbacks_of,
    torch_optimizer,
    worker_has_moved,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.epochs import TrainingData
    from lightning_async_localsgd.joining import Entry
    from lightning_async_localsgd.limits import LiftedLimits
    from lightning_async_localsgd.phase_base import Phase
    from lightning_async_localsgd.rendezvous import Rendezvous
    from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy


_INNER_STATE = "inner state"


class AsyncTraining:
    """What the strategy's hooks come to while ranks run at their own speed, until :meth:`release`.

    Args:
        trainer: the trainer, about to run its first batch.
        phase: this rank's part in the exchange, just begun.
        data: the training data.
        limits: the trainer's limits, lifted; given back at the end.
        budget: what these limits come to.
        restored: of a single rank's training data, see :meth:`.TrainingData.state_dict`.
        entry: the way in of a rank that joins a training that runs already.

    Attributes:
        phase: as given.
        local_values: warns of collectives that are local; None on a single rank.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        phase: Phase,
        data: TrainingData,
        limits: LiftedLimits,
        budget: RunBudget,
        restored: dict[str, Any] | None,
        entry: Entry | None = None,
    ) -> None:
        self.phase = phase
        self._entry = entry
        self.local_values: LocalValues | None = None
        self._trainer = trainer
        self._data = data
        self._limits = limits
        self._budget = budget
        self._data_ended = False
        self._agreement: Agreement | None = None
        self._inner_states: InnerStates | None = None
        self._awaited_states: AwaitedStates | None = None
        self._held = ExitStack()
        try:
            self._begin(restored)
        except BaseException:
            self.release()
            raise

    def _begin(self, restored: dict[str, Any] | None) -> None:
        """Takes hold of the trainer. What is taken first is given back last."""
        trainer, phase, held = self._trainer, self.phase, self._held
        strategy: AsyncLocalSGDStrategy = trainer.strategy  # type: ignore[assignment]
        held.callback(self._limits.restore)
        if self._budget.ends_with_data:
            self._limits.keep_epochs()
        if not trainer.is_global_zero:
            # Ranks above 0 neither validate nor save.
            trainer.limit_val_batches = 0
            held.callback(RestingCallbacks(trainer).wake)
        held.callback(self._data.end)
        if self._entry is not None:
            self._begin_at(self._entry.facts.epoch)
        self._data.begin(phase.lease_stock, restored)
        if trainer.is_global_zero:
            held.callback(GlobalAverages(trainer, phase, self._data.global_epochs).release)
        self._counts = GlobalCounts(trainer, phase, self._data)
        held.callback(self._counts.release)
        if not phase.alone:
            self._agreement = Agreement(trainer, phase)
            held.callback(self._agreement.release)
            self.local_values = LocalValues(trainer)
        begun = self._counts.steps if self._entry is None else 0
        self._schedulers = ProgressSchedulers(trainer, begun, self._budget, phase.ahead, self._counts.counted_as)
        held.callback(self._schedulers.release)
        # A rank that joins is where the others are; and there may be so few steps that none are left for this rank.
        if phase.stopped or self._entry is not None:
            with warnings.catch_warnings():
                # The steps that the schedule is ahead by are those of the others.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self._follow()
        optimizer = torch_optimizer(trainer.strategy.optimizers[0])
        held.callback(optimizer.register_step_post_hook(lambda *_: self._count_step()).remove)
        if trainer.is_global_zero:
            held.callback(PeriodicCheckpoints(trainer, phase).release)
            if phase.server is not None and not phase.alone and strategy.checkpoint_every is not None:
                self._awaited_states = AwaitedStates(phase.server, folder_of(trainer))
        else:
            self._inner_states = InnerStates(trainer, phase)
            held.callback(self._inner_states.release)
        for callback in callbacks_of(trainer):
            if isinstance(callback, AsyncLocalSGDCallback):
                callback.on_async_phase_start(trainer, phase)

    # ---------------------------------------------------------------- the loop

    @property
    def global_epochs(self) -> bool:
        """Whether the ranks' epochs are the run's, and not each rank's own."""
        return self._data.global_epochs

    @property
    def ends_with_this_epoch(self) -> bool:
        """Whether the run ends with this rank's epoch, after its last batch."""
        return self._budget.ends_with_data and self._trainer.current_epoch + 1 >= (self._trainer.max_epochs or 0)

    def before_epoch(self) -> None:
        """An epoch of this rank is about to begin, its data loaders are set up."""
        if self._data.prepare():
            self._replan()
        self.phase.begin_epoch(self._trainer.current_epoch)
        self._counts.before_epoch()

    def end_epoch(self) -> None:
        """An epoch of this rank is over; called before any callback does what it does then."""

    def before_batch(self) -> None:
        """A batch is about to be trained on; called before any callback sees it."""
        self._counts.before_batch()

    def see_batch(self, batch: Any) -> None:
        """The same, after all callbacks."""
        self._data.see_batch(batch)
        self.phase.see_batch(batch_size(batch), batch_tokens(batch))

    def end_step(self) -> None:
        """An optimizer step has been taken, or skipped."""
        if self.phase.stopped:
            return
        adopted = self.phase.end_step()
        last = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.ends_with_this_epoch and last and not self.phase.stopped:
            # All wait for one another here, so that the last validation and the last checkpoint are of the final model.
            self._data_ended = adopted = True
            self.phase.finish(stop=False)
        if adopted:
            self._adapt_optimizers()
            if self._awaited_states is not None:
                self._awaited_states.look()
        self._follow()

    def after_batch(self) -> None:
        """A batch has been trained on; called before any callback sees it."""
        self._counts.after_batch()
        if self.phase.asked_to_stop:
            self._trainer.should_stop = True  # From here on this loop sees to it that a minimum is reached.

    def settle(self) -> None:
        """The global model is about to be shown or saved: a single worker hands in what it has learned so far."""
        if self.phase.settle():
            self._adapt_optimizers()
            self._follow()

    def end_validation(self) -> None:
        """Rank 0 has validated, and may have decided to stop."""
        if self._agreement is not None:
            self._agreement.end_validation()
        trainer = self._trainer
        if trainer.should_stop and trainer.fit_loop._can_stop_early and not self.phase.stopped:
            self.phase.request_stop()

    def finish(self) -> None:
        """Ends training if it has not ended yet; afterwards the module holds the final global model.

        Called where this rank's loop comes to its end by itself: because its data has ended, which the others go on
        to do in their own time, or else (``trainer.should_stop``) for everybody.
        """
        if not self.phase.stopped:
            self._data_ended = self._budget.ends_with_data and not self._trainer.should_stop
            if self._entry is not None and self._entry.stranger and not self._data_ended:
                self.phase.leave()  # The others need not stop for that.
            else:
                # What the others have taken is an estimate on this rank, and its epochs may be ahead of rank 0's.
                if not (self._data_ended or self._trainer.is_global_zero) and has_minimum(self._trainer):
                    self.phase.finish_and_ask()
                else:
                    self.phase.finish(stop=not self._data_ended)
            self._follow()

    # ------------------------------------------------------------- inner states

    def ask_for_inner_states(self, checkpoint: Any, state: dict[str, Any]) -> None:
        """Rank 0 has written a checkpoint: workers save the states that belong to it, see :class:`.AwaitedStates`."""
        if self._awaited_states is not None:
            self._awaited_states.ask(checkpoint, state)

    def forget_checkpoint(self, checkpoint: Any) -> None:
        """Rank 0 has removed a checkpoint."""
        if self._awaited_states is not None:
            self._awaited_states.forget(checkpoint)

    def save_inner_states(self, rendezvous: Rendezvous) -> None:
        """After the end, on every rank: workers save their states once more if there are checkpoints they belong to."""
        wanted = rendezvous.broadcast(self._awaited_states is not None and self._awaited_states.asked > 0)
        if wanted and self._inner_states is not None:
            rendezvous.post(_INNER_STATE, self._inner_states.finish())

    def gather_inner_states(self, rendezvous: Rendezvous) -> None:
        """After that, on rank 0: keeps them beside the checkpoints."""
        server = self.phase.server
        if self._awaited_states is None or server is None or not self._awaited_states.asked:
            return
        names = {worker: name for worker, name in rendezvous.posted(_INNER_STATE).items() if name}
        server.ask(lambda coordinator: coordinator.attendance.inner_states.update(names))
        self._awaited_states.finish(names)

    # ----------------------------------------------------------------- the end

    def agree(self, rendezvous: Rendezvous) -> None:
        """After the end: all ranks count as rank 0 does, and hold its learning rates."""
        if self._agreement is not None:
            self._agreement.agree(rendezvous)
        self._counts.agree(rendezvous.broadcast(self._counts.steps))
        self._data.agree()

    def state_dict(self) -> dict[str, Any]:
        """Rank 0: what a checkpoint holds of the run."""
        state = self.phase.state_dict()
        if self.phase.alone:
            state["alone"] = self._data.state_dict()
        return state

    def release(self) -> None:
        """Gives the trainer back what was taken from it. May be called twice."""
        self._held.close()
        self.local_values = None

    # ---------------------------------------------------------------- internal

    def _begin_at(self, epoch: int) -> None:
        """This rank's first epoch is the one that the others are in."""
        progress = self._trainer.fit_loop.epoch_progress
        for counts in (progress.total, progress.current):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, epoch)

    def _count_step(self) -> None:
        self.phase.worker.count_step()
        self._counts.count_step()

    def _replan(self) -> None:
        """The data was reloaded, and its epochs may be longer or shorter from now on."""
        trainer, epochs = self._trainer, self._budget.epochs
        rest = epoch_steps(trainer, self._data, range(trainer.current_epoch, len(epochs)))
        if rest and rest != list(epochs[trainer.current_epoch :]):
            self._budget = RunBudget.of_epochs([*epochs[: trainer.current_epoch], *rest])
            self.phase.replan(self._budget)
            self._schedulers.replan(self._budget)

    @property
    def _scheduled_steps(self) -> int:
        """Global steps that schedulers are to have followed."""
        return self._counts.steps

    def _adapt_optimizers(self) -> None:
        """The module holds other weights than its optimizers have left there."""
        if not self.phase.keeps_weights:
            for optimizer in self._trainer.strategy.optimizers:
                worker_has_moved(torch_optimizer(optimizer), self.phase.worker.diverged, self.phase.worker.renewed)

    def _follow(self) -> None:
        """Schedulers follow the progress, and the trainer stops when the run has ended."""
        if self.phase.stopped:
            self._counts.finish()
        self._schedulers.advance(self._scheduled_steps)
        if self._agreement is not None:
            self._agreement.follow()
        if self.phase.stopped:
            budget = self._budget
            by_steps = budget.limit == "max_steps" and self.phase.progress >= (budget.planned or 0)
            self._limits.stop(met=self._data_ended or by_steps)
