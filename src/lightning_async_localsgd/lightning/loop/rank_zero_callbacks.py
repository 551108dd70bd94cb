"""Callbacks that run on rank 0 only: they save, watch validation, or average the global model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint

from lightning_async_localsgd.lightning.mixed_in import mixed_in
from lightning_async_localsgd.lightning.trainer_access.callbacks import WEIGHT_AVERAGING, callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl


def _rest(*_: Any, **__: Any) -> None:
    """Do nothing, in place of a hook."""


_Resting = type("_Resting", (), {name: _rest for name in vars(Callback) if name.startswith("on_")})
"""All hooks of the training loop, which do nothing."""


class RestingCallbacks:
    """Let the callbacks that run on rank 0 only rest in another rank's trainer, until :meth:`restore`.

    Ranks above 0 neither validate nor save, so these callbacks would miss their metric or average local weights. They
    stay among the trainer's callbacks, because user code reads their settings: ``trainer.checkpoint_callback.dirpath``.

    Args:
        trainer: trainer of a rank above 0.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        resting = [callback for callback in callbacks_of(trainer) if _is_rank_zero_only(callback)]
        self._restores = [mixed_in(callback, _Resting) for callback in resting]

    def restore(self) -> None:
        """Let the callbacks run again."""
        for restore in reversed(self._restores):
            restore()
        self._restores = []


def callback_states(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the states of the callbacks that run on rank 0 only, such as the path of the best model."""
    return [callback.state_dict() for callback in callbacks_of(trainer) if _is_rank_zero_only(callback)]


def load_callback_states(trainer: pl.Trainer, states: list[dict[str, Any]]) -> None:
    """Load rank 0's :func:`callback_states` on another rank."""
    callbacks = [callback for callback in callbacks_of(trainer) if _is_rank_zero_only(callback)]
    for callback, state in zip(callbacks, states, strict=True):
        if isinstance(callback, ModelCheckpoint):
            # Lightning broadcasts it before training, but a worker that joins is not there then. It may have found
            # another one, because its logger begins a new version.
            callback.dirpath = state.get("dirpath", callback.dirpath)
        if state:  # Lightning does not load an empty state from a checkpoint either.
            callback.load_state_dict(state)


def _is_rank_zero_only(callback: Callback) -> bool:
    return isinstance(callback, (Checkpoint, EarlyStopping, WEIGHT_AVERAGING))
