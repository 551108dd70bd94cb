"""The trainer's callbacks, and settings of Lightning's callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.tuner.lr_finder import _LRCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback

WEIGHT_AVERAGING: Any = getattr(callbacks, "WeightAveraging", ())
"""Class of the callbacks that average weights by steps, for ``isinstance``; empty if Lightning has no such class."""

EMA_WEIGHT_AVERAGING: Any = getattr(callbacks, "EMAWeightAveraging", ())
"""Class of the callbacks that keep an exponential moving average, for ``isinstance``; empty without such a class."""


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Return the trainer's list of callbacks, which may be changed."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return] # set by one of the trainer's connectors


def model_checkpoints_of(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """Return the trainer's ``ModelCheckpoint`` callbacks."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, ModelCheckpoint)]


def may_unfreeze(trainer: pl.Trainer) -> bool:
    """Return whether a callback makes frozen parameters trainable while training runs."""
    return any(isinstance(callback, BaseFinetuning) for callback in callbacks_of(trainer))


def searches_learning_rate(trainer: pl.Trainer) -> bool:
    """Return whether ``LearningRateFinder`` is trying learning rates. It then replaces the trainer's callbacks."""
    return any(isinstance(callback, _LRCallback) for callback in callbacks_of(trainer))


def steps_between_checkpoints(callback: ModelCheckpoint) -> int:
    """Return ``every_n_train_steps``, or 0 if the callback does not save by steps."""
    return callback._every_n_train_steps


def set_steps_between_checkpoints(callback: ModelCheckpoint, steps: int) -> None:
    """Set ``every_n_train_steps``. The callback saves if ``trainer.global_step`` modulo ``steps`` is 0."""
    callback._every_n_train_steps = steps


@contextmanager
def saving_as_in(callback: Callback, epoch: int) -> Iterator[None]:
    """Let a ``ModelCheckpoint`` act on a model of another epoch and step, for the duration of a ``with`` block.

    With ``every_n_epochs`` the callback saves if ``trainer.current_epoch + 1`` modulo its interval is 0. It saves only
    once at a ``trainer.global_step``, but the other model is another one, whether or not this step's was or will be
    saved. Other callbacks are not changed.
    """
    if not isinstance(callback, ModelCheckpoint):
        yield
        return
    interval, step = callback._every_n_epochs, callback._last_global_step_saved
    callback._every_n_epochs = _FixedInterval(interval, epoch + 1)
    callback._last_global_step_saved = -1
    try:
        yield
    finally:
        callback._every_n_epochs, callback._last_global_step_saved = interval, step


class _FixedInterval(int):
    """An interval for which ``count % interval`` does not depend on ``count``."""

    counted: int

    def __new__(cls, interval: int, count: int) -> _FixedInterval:
        fixed = super().__new__(cls, interval)
        fixed.counted = count
        return fixed

    def __rmod__(self, count: int) -> int:
        return self.counted % int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def average_of(callback: Any) -> Any:
    """Return the averaged model of a ``WeightAveraging`` callback, which updates it with ``update_parameters``."""
    return callback._average_model


def cancel_batch_norm_epoch(callback: StochasticWeightAveraging) -> bool:
    """Cancel the epoch in which the callback measures BatchNorm statistics, and return whether one was planned.

    If the module contains BatchNorm, the callback has added 1 to the trainer's ``max_epochs``.
    """
    planned = bool(callback._model_contains_batch_norm)
    callback._model_contains_batch_norm = False
    return planned
