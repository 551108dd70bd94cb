"""Sizes of batches and of optimizer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl


class OwnAccumulation(int):
    """A worker's own ``accumulate_grad_batches``, which knows the script's value.

    Lightning divides losses by the own value and ends windows after it. ``trainer.estimated_stepping_batches`` divides
    a number of batches by it, which are those of the script.
    """

    of_script: int

    def __new__(cls, own: int, of_script: int) -> OwnAccumulation:
        """Return the worker's own value."""
        value = super().__new__(cls, own)
        value.of_script = of_script
        return value

    def __rtruediv__(self, batches: float) -> float:
        """Return how many steps of the script a number of its batches is."""
        return batches / self.of_script

    def __reduce__(self) -> tuple[type[OwnAccumulation], tuple[int, int]]:
        return OwnAccumulation, (int(self), self.of_script)


def accumulated_batches(trainer: pl.Trainer, epoch: int) -> int:
    """Return the number of batches in an optimizer step of an epoch. With manual optimization it counts as 1.

    If workers have batch sizes of their own, this is the number that the script has set, the same on all of them.
    """
    if not trainer.lightning_module.automatic_optimization:
        return 1
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return int(callback.get_accumulate_grad_batches(epoch))
    accumulated = trainer.accumulate_grad_batches
    return accumulated.of_script if isinstance(accumulated, OwnAccumulation) else int(accumulated)


def batch_tokens(batch: Any) -> int:
    """Return the number of tokens in a batch.

    These are the elements of the first tensor of integers that has two or more dimensions. If the batch contains no
    such tensor, each sample counts as one token.
    """
    tokens = _first_tokens(batch)
    return batch_size(batch) if tokens is None else tokens.numel()


def _first_tokens(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        is_tokens = batch.ndim >= 2 and not (
            batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool
        )
        return batch if is_tokens else None
    if isinstance(batch, dict):
        batch = batch.values()
    if isinstance(batch, (list, tuple)) or (hasattr(batch, "__iter__") and not isinstance(batch, (str, bytes))):
        return next((tokens for tokens in map(_first_tokens, batch) if tokens is not None), None)
    return None


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of the first tensor in it, or 1 without a tensor."""
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
