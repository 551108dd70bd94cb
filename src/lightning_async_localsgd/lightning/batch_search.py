"""Searches for the largest batch size that fits, with Lightning's own finder, before training.

Each rank searches for itself. Meanwhile, the strategy is one of a single device.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from typing_extensions import override

from lightning_async_localsgd.lightning.mixed_in import mixed_in
from lightning_async_localsgd.lightning.trainer_access.batch_size import find_batch_size, resuming_later
from lightning_async_localsgd.lightning.trainer_access.data import data_is_a_hook, forget_data
from lightning_async_localsgd.protocol.messages import DOES_NOT_FIT

if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as pl

    from lightning_async_localsgd.lightning.fit_state import FitState

_ATTRIBUTE = "batch_size"
"""Attribute of the module, its ``hparams`` or the datamodule that Lightning's finder changes."""


class _SingleDevice(DDPStrategy):
    """Mixin for the strategy while it searches: there are no other ranks, and nothing is asynchronous."""

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for no rank."""

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of this rank."""
        return obj

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Return the script's own loader."""
        return dataloader

    @override
    def on_train_start(self) -> None:
        """Start no asynchronous training."""

    @override
    def on_train_end(self) -> None:
        """End no asynchronous training."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save what the finder restores after its trials, on every rank."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load what :meth:`save_checkpoint` has saved."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=False)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove what :meth:`save_checkpoint` has saved."""
        self.checkpoint_io.remove_checkpoint(filepath)


def search_for(strategy: DDPStrategy, trainer: pl.Trainer, fit: FitState) -> None:
    """Search for this rank's batch size, and note in the fit what was found, or why nothing was.

    The other ranks are told of the error when they wait for this one. An evaluator trains on nothing.
    """
    if fit.grant is not None and fit.grant.evaluates:
        return
    try:
        fit.found_batch_size = search_batch_size(strategy, trainer)
    except ValueError as error:
        fit.search_error = str(error)


def search_batch_size(strategy: DDPStrategy, trainer: pl.Trainer) -> int:
    """Return the largest power of two of samples whose steps fit into the memory of this rank's device.

    The module, its optimizers and the random numbers are as before. The data loader has its own batch size again.

    Raises:
        ValueError: Lightning's finder cannot search, or not even one sample fits. The text says why.

    """
    module = trainer.lightning_module
    if not lightning_hasattr(module, _ATTRIBUTE):
        raise ValueError(
            "batch_size='auto' uses Lightning's BatchSizeFinder, which changes the attribute 'batch_size' of the "
            "module, its hparams or the datamodule, but none has one; add it and use it in train_dataloader(), or give "
            "sizes by worker"
        )
    if not data_is_a_hook(trainer):
        raise ValueError(
            "batch_size='auto' uses Lightning's BatchSizeFinder, which asks for the data loader again with each size, "
            "but the loader was passed to fit(); define train_dataloader() in the module or a datamodule, or give "
            "sizes by worker"
        )
    before = lightning_getattr(module, _ATTRIBUTE)
    with ExitStack() as stack:
        stack.callback(forget_data, trainer)
        stack.callback(lightning_setattr, module, _ATTRIBUTE, before)
        stack.enter_context(resuming_later(trainer))
        stack.callback(mixed_in(strategy, _SingleDevice))
        forget_data(trainer)  # A schedule may have asked for the loader, which the strategy has replaced.
        try:
            found = find_batch_size(trainer, _ATTRIBUTE)
        except ValueError as error:
            if lightning_getattr(module, _ATTRIBUTE) == 0:
                raise ValueError(f"batch_size='auto' found that a step of one sample {DOES_NOT_FIT}") from error
            raise
        except MisconfigurationException as error:
            raise ValueError(
                f"batch_size='auto' uses Lightning's BatchSizeFinder, which cannot search: {error}"
            ) from error
    if found is None:
        raise ValueError("batch_size='auto' cannot search with fast_dev_run; give sizes by worker")
    return found
