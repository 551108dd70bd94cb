"""Validations of a model that has not changed since the last validation. They decide nothing."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_async_localsgd.lightning.mixed_in import mixed_in
from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.runtime.base import Runtime


class UnchangedValidations:
    """Keep validations of an unchanged global model from deciding anything, until :meth:`restore`.

    Workers are recalled before a validation, so that the model has changed. That is not possible if the pushes were
    refused, or wait for their group. Early stopping and a plateau scheduler would then count "no improvement", and the
    best checkpoint might be that of an untrained model.

    Args:
        trainer: the trainer of rank 0.
        runtime: rank 0's part in asynchronous training.

    Attributes:
        counts: whether the last validation was of a model that had changed.

    """

    def __init__(self, trainer: pl.Trainer, runtime: Runtime) -> None:
        self.counts = True
        self._trainer = trainer
        self._runtime = runtime
        assert runtime.server is not None
        self._version = runtime.server.snapshot.version
        self._steps = runtime.global_steps
        self._warned = False
        self._restores = ExitStack()
        for callback in callbacks_of(trainer):
            if isinstance(callback, (EarlyStopping, ModelCheckpoint)) and callback.monitor is not None:
                self._restores.callback(mixed_in(callback, _DecidingCallback, _validations=self))
        for config in trainer.strategy.lr_scheduler_configs:
            if config.reduce_on_plateau:
                self._restores.callback(mixed_in(config.scheduler, _DecidingScheduler, _validations=self))

    def begin(self, version: int) -> None:
        """Note that this version of the global model is about to be validated."""
        steps = self._runtime.global_steps
        self.counts = version != self._version or steps <= self._steps or self._runtime.stopped
        self._version, self._steps = version, steps
        if not self.counts and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The global model has not changed since the last validation, though the run has gone on to step "
                f"{self._trainer.global_step}: no round was merged in between. EarlyStopping, ModelCheckpoint and "
                "ReduceLROnPlateau ignore this validation, and others like it. Use fewer local_steps, or validate less "
                "often."
            )

    def restore(self) -> None:
        """Let callbacks and schedulers act on every validation again."""
        self._restores.close()


class _DecidingCallback:
    """Mixin for a callback that acts on a metric."""

    _validations: UnchangedValidations

    def on_validation_end(self, *arguments: Any) -> None:
        if self._validations.counts:
            super().on_validation_end(*arguments)  # type: ignore[misc]

    def on_train_epoch_end(self, *arguments: Any) -> None:
        if self._validations.counts:
            super().on_train_epoch_end(*arguments)  # type: ignore[misc]


class _DecidingScheduler:
    """Mixin for a scheduler that follows a metric."""

    _validations: UnchangedValidations

    def step(self, *arguments: Any, **options: Any) -> None:
        if self._validations.counts:
            super().step(*arguments, **options)  # type: ignore[misc]
