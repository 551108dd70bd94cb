"""Lightning's search for the largest batch size that fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning.pytorch.tuner.batch_size_scaling import _scale_batch_size
from lightning.pytorch.utilities.seed import isolate_rng

if TYPE_CHECKING:
    import lightning.pytorch as pl


def find_batch_size(trainer: pl.Trainer, attribute: str) -> int | None:
    """Return the batch size that Lightning's finder finds with its defaults; None with ``fast_dev_run``.

    Lightning refuses this for distributed strategies before it begins, because ranks would change the batch size of one
    another.

    Args:
        trainer: the trainer, after the set-up of its strategy and before training.
        attribute: attribute of the module, its ``hparams`` or the datamodule that has the batch size.

    """
    with isolate_rng():
        return _scale_batch_size(trainer, batch_arg_name=attribute)


@contextmanager
def resuming_later(trainer: pl.Trainer) -> Iterator[None]:
    """Keep the checkpoint that the trainer is resuming from, while others are saved and restored."""
    connector = trainer._checkpoint_connector
    checkpoint, path = connector._loaded_checkpoint, connector._ckpt_path
    try:
        yield
    finally:
        connector._loaded_checkpoint, connector._ckpt_path = checkpoint, path
