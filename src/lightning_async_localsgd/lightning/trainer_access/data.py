"""Training data: the source, the combined loader and the fetcher of batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.trainer.states import RunningStage

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

DataFetcher = _DataFetcher
"""Iterator from which the training loop takes batches. Its attribute ``done`` tells whether a batch is the last."""

PrefetchDataFetcher = _PrefetchDataFetcher
"""The usual fetcher. It loads one batch ahead, if the number of batches is unknown, to recognize the last batch."""

DataLoaderIterDataFetcher = _DataLoaderIterDataFetcher
"""The fetcher of modules with ``training_step(self, dataloader_iter)``, which take batches themselves."""


def has_training_data(trainer: pl.Trainer) -> bool:
    """Return whether ``fit`` was given training data, or the module or datamodule defines some."""
    return bool(trainer.fit_loop._data_source.is_defined())


def data_is_a_hook(trainer: pl.Trainer) -> bool:
    """Return whether the training loader comes from a hook of the module or datamodule, so that it can be asked for."""
    return bool(trainer.fit_loop._data_source.is_module())


def forget_data(trainer: pl.Trainer) -> None:
    """Let Lightning ask for the loaders of training and validation again."""
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def set_training_data(trainer: pl.Trainer, data: Any) -> None:
    """Set the training data, as ``trainer.fit(train_dataloaders=data)`` does."""
    trainer.fit_loop._data_source.instance = data


def combined_loader(trainer: pl.Trainer) -> CombinedLoader | None:
    """Return the training loaders, or None if Lightning has not set training data up yet."""
    return trainer.fit_loop._combined_loader


def data_fetcher(trainer: pl.Trainer) -> DataFetcher:
    """Return the object from which the training loop takes batches. Training data must be set up."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return fetcher


def reload_training_data(trainer: pl.Trainer) -> None:
    """Set training data up again: ask for the loaders and process each. Lightning keeps loaders once they are set."""
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.setup_data()


def loader_mode(loader: CombinedLoader) -> str:
    """Return how several loaders are combined: ``"min_size"``, ``"max_size"``, ``"max_size_cycle"``, ..."""
    return loader._mode


def with_loaders(combined: CombinedLoader, loaders: Sequence[Any]) -> CombinedLoader:
    """Return a copy that combines other loaders in the same way, and is iterated independently."""
    copied = copy.copy(combined)
    copied._iterator = None
    copied.flattened = list(loaders)
    return copied


def set_distributed_sampler(trainer: pl.Trainer, enabled: bool) -> bool:
    """Set the trainer's ``use_distributed_sampler`` and return its previous value.

    If the option is on, Lightning replaces the samplers of all loaders, in training and evaluation.
    """
    connector = trainer._accelerator_connector
    before, connector.use_distributed_sampler = connector.use_distributed_sampler, enabled
    return bool(before)


def split_among_ranks(trainer: pl.Trainer, loader: object) -> object:
    """Return the training loader with a distributed sampler, as under DDP, if Lightning can give it one."""
    before = set_distributed_sampler(trainer, True)
    try:
        return trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)
    finally:
        set_distributed_sampler(trainer, before)
