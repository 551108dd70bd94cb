"""The steps of the synchronous beginning in Lightning's training loop.

In such a step, a rank accumulates the gradients of as many local steps as the server has asked for. Before the
optimizer's step, gradients are replaced by the mean of all ranks, so that clipping, hooks and the optimizer see the
same as under DDP. Lightning takes its step at the last batch only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_async_localsgd.lightning.data.batch_sizes import OwnAccumulation, accumulated_batches
from lightning_async_localsgd.lightning.trainer_access.loop import control_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

    from lightning_async_localsgd.runtime.base import Runtime


class SynchronousSteps:
    """Decide at which batches a step of the synchronous beginning begins and ends, until the beginning is over.

    Args:
        trainer: the trainer.
        runtime: this rank's part in training.

    """

    def __init__(self, trainer: pl.Trainer, runtime: Runtime) -> None:
        self._trainer = trainer
        self._runtime = runtime
        self._batches = 0
        self._begins = True
        self._ends = True
        self._averaged = False
        self._restore: Callable[[], None] | None = None
        if self.on:
            self._control()

    @property
    def on(self) -> bool:
        """Whether this rank's next step is synchronous."""
        return self._runtime.worker.synchronous

    def _control(self) -> None:
        self._restore = control_steps(self._trainer, lambda: self._begins, lambda: self._ends)

    @property
    def ends_local_step(self) -> bool:
        """Whether a local step ends with the current batch, whether or not the optimizer takes a step."""
        return self._ends or self._batches % self._accumulated == 0

    def before_batch(self) -> None:
        """Decide whether a step begins and ends with the next batch."""
        if not self.on:
            self.restore()
            return
        if self._ends:
            self._batches = 0
            self._averaged = False
        self._begins = self._batches == 0
        self._batches += 1
        reply = self._runtime.worker.reply
        assert reply is not None
        is_last = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._ends = self._batches >= reply.local_steps * self._accumulated or bool(is_last)

    def after_batch(self, stepped: bool) -> None:
        """Count the local step that ends with the batch, if no optimizer step has ended it.

        Args:
            stepped: whether the optimizer has taken a step.

        """
        if self.on and not stepped and self.ends_local_step:
            self._runtime.count_gradients()

    def average(self) -> None:
        """Average the gradients of all ranks, before the optimizer's step.

        Raises:
            RuntimeError: The optimizer evaluates the gradients more than once in a step.

        """
        if self._averaged:
            raise RuntimeError(
                f"{type(self._trainer.optimizers[0]).__name__} evaluates the loss several times in a step, which the "
                "synchronous beginning cannot average over workers; use another optimizer, or sync_warmup_steps=0"
            )
        self._averaged = True
        self._runtime.count_gradients()
        self._runtime.average_gradients(self._factor)

    def restore(self) -> None:
        """Let Lightning decide again."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    @property
    def _factor(self) -> float:
        """Factor that makes the accumulated gradients the mean over the batches of the step.

        Lightning has divided each batch's loss by the number of batches in a usual step.
        """
        return int(self._trainer.accumulate_grad_batches) / self._batches

    @property
    def _accumulated(self) -> int:
        own = self._trainer.accumulate_grad_batches
        return (
            int(own)
            if isinstance(own, OwnAccumulation)
            else accumulated_batches(self._trainer, self._trainer.current_epoch)
        )
