"""Small pieces of a trainer that the strategy takes hold of: its callbacks, its optimizers, the size of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback
    from torch.optim import Optimizer


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """The trainer's list of callbacks, which may be changed."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return] # set by one of its connectors


class RestingCallbacks:
    """Keeps checkpoint and early-stopping callbacks out of a trainer, until :meth:`wake`.

    Ranks above 0 neither validate nor save: what does so, or acts on its outcome, rests on them.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        callbacks = enumerate(callbacks_of(trainer))
        self._resting = [(at, callback) for at, callback in callbacks if _acts_on_validation(callback)]
        for _, callback in self._resting:
            callbacks_of(trainer).remove(callback)

    def wake(self) -> None:
        """Puts them back where they were."""
        for at, callback in self._resting:
            callbacks_of(self._trainer).insert(at, callback)
        self._resting = []


def states_of_callbacks(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """What the checkpoint and early-stopping callbacks know, such as the best model's path."""
    return [callback.state_dict() for callback in callbacks_of(trainer) if _acts_on_validation(callback)]


def load_states_of_callbacks(trainer: pl.Trainer, states: list[dict[str, Any]]) -> None:
    """Makes the trainer's callbacks know what those of another rank know."""
    mine = [callback for callback in callbacks_of(trainer) if _acts_on_validation(callback)]
    for callback, state in zip(mine, states, strict=True):
        callback.load_state_dict(state)


def _acts_on_validation(callback: Callback) -> bool:
    return isinstance(callback, (Checkpoint, EarlyStopping))


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer itself, without Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def make_finite(optimizer: Optimizer) -> None:
    """Sets what is not finite in the optimizer's state to zero, and keeps the rest."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


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
