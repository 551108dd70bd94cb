"""Small pieces of a trainer that the strategy takes hold of: its callbacks, its optimizers, the size of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import Tensor
from torch.optim import LBFGS

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback
    from torch.optim import Optimizer

WEIGHT_AVERAGING: Any = getattr(callbacks, "WeightAveraging", ())
"""The class of callbacks that average weights by steps; nothing is one where Lightning is too old to have it."""


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """The trainer's list of callbacks, which may be changed."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return] # set by one of its connectors


def model_checkpoints_of(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """The callbacks that save checkpoints every so often."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, ModelCheckpoint)]


def accumulated_batches(trainer: pl.Trainer, epoch: int) -> int:
    """Batches of one optimizer step in an epoch."""
    if not trainer.lightning_module.automatic_optimization:
        return 1
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return int(callback.get_accumulate_grad_batches(epoch))
    return int(trainer.accumulate_grad_batches)


class RestingCallbacks:
    """Keeps callbacks that are rank 0's alone out of a trainer, until :meth:`wake`.

    Ranks above 0 neither validate nor save: what does so, or acts on its outcome, rests on them. So does what averages
    weights: the average is that of the global model.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        callbacks = enumerate(callbacks_of(trainer))
        self._resting = [(at, callback) for at, callback in callbacks if _is_of_rank_0(callback)]
        for _, callback in self._resting:
            callbacks_of(trainer).remove(callback)

    def wake(self) -> None:
        """Puts them back where they were."""
        for at, callback in self._resting:
            callbacks_of(self._trainer).insert(at, callback)
        self._resting = []


def states_of_callbacks(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """What the callbacks of rank 0 alone know, such as the best model's path."""
    return [callback.state_dict() for callback in callbacks_of(trainer) if _is_of_rank_0(callback)]


def load_states_of_callbacks(trainer: pl.Trainer, states: list[dict[str, Any]]) -> None:
    """Makes the trainer's callbacks know what those of another rank know."""
    mine = [callback for callback in callbacks_of(trainer) if _is_of_rank_0(callback)]
    for callback, state in zip(mine, states, strict=True):
        if state:  # As in a checkpoint: a callback that has none to give has none to load.
            callback.load_state_dict(state)


def _is_of_rank_0(callback: Callback) -> bool:
    return isinstance(callback, (Checkpoint, EarlyStopping, WEIGHT_AVERAGING))


def searches_learning_rate(trainer: pl.Trainer) -> bool:
    """Whether this is Lightning's ``LearningRateFinder`` trying learning rates, not the training itself."""
    return any(isinstance(callback, _LRCallback) for callback in callbacks_of(trainer))


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer itself, without Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def may_unfreeze(trainer: pl.Trainer) -> bool:
    """Whether a callback may make frozen parameters trainable while training runs."""
    return any(isinstance(callback, BaseFinetuning) for callback in callbacks_of(trainer))


def worker_has_moved(optimizer: Optimizer, diverged: bool, renewed: bool) -> None:
    """Fits the optimizer's state to weights that it has not put there itself. Averages and moments stay as they are.

    Args:
        optimizer: of a worker that has adopted the global model.
        diverged: the worker's round came to values that are not finite. The model that came back is sound, the
            optimizer's averages are not: what is not finite in them starts from zero again.
        renewed: the optimizer begins anew.

    """
    if renewed or isinstance(optimizer, LBFGS):
        # The memory of LBFGS pairs steps with the changes of the gradient along them; the way from its last weights to
        # these is none of its steps. So it begins anew, with a step along the gradient.
        optimizer.state.clear()
    if diverged:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def batch_tokens(batch: Any) -> int:
    """Tokens of a batch: the elements of the first tensor of integers in it with two dimensions or more, else rows."""
    tokens = _first_tokens(batch)
    return batch_size(batch) if tokens is None else tokens.numel()


def _first_tokens(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        counts = batch.ndim >= 2 and not (batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool)
        return batch if counts else None
    if isinstance(batch, dict):
        batch = batch.values()
    if isinstance(batch, (list, tuple)) or (hasattr(batch, "__iter__") and not isinstance(batch, (str, bytes))):
        return next((found for found in map(_first_tokens, batch) if found is not None), None)
    return None


def batch_size(batch: Any) -> int:
    """Rows of a batch: the first dimension of the first tensor in it; 1 where there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, dict):
        batch = batch.values()
    if isinstance(batch, (list, tuple)) or (hasattr(batch, "__iter__") and not isinstance(batch, (str, bytes))):
        for part in batch:
            size = batch_size(part)
            if size > 1 or isinstance(part, Tensor):
                return size
    return 1
