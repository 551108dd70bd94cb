"""Loaders that are not shared by the strategy: their datasets learn the rank from ``torch.distributed``, as with DDP.

With DDP, a dataset that splits itself asks the process group for its rank. In ``fit`` there is none, so the dataset
would take everything on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, IterDataPipe, MapDataPipe
from typing_extensions import override

from lightning_async_localsgd.launch.rank_environment import ranks_in_torch_distributed
from lightning_async_localsgd.lightning.mixed_in import mixed_in


class _RankAwareLoader(DataLoader[Any]):
    """Mixin for a user's loader, whose dataset runs with :func:`.ranks_in_torch_distributed`."""

    ranks_shown: Callable[[], AbstractContextManager[None]]

    @override
    def __iter__(self) -> Any:
        with self.ranks_shown():
            iterator = super().__iter__()
        # Worker processes were started just now, and keep what they have seen.
        return iterator if self.num_workers > 0 else _RankAwareIterator(iterator, self.ranks_shown)


class _RankAwareIterator:
    def __init__(self, iterator: Any, ranks_shown: Callable[[], AbstractContextManager[None]]) -> None:
        self._iterator = iterator
        self._ranks_shown = ranks_shown

    def __iter__(self) -> _RankAwareIterator:
        return self

    def __next__(self) -> Any:
        with self._ranks_shown():
            return next(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def make_rank_aware(loader: object, rank: int, world_size: int) -> Callable[[], None]:
    """Let the dataset of a loader learn the rank from ``torch.distributed``, until the returned function is called.

    Args:
        loader: the user's loader, which is changed. Other objects than data loaders stay as they are.
        rank: this rank.
        world_size: number of ranks.

    """
    if not isinstance(loader, DataLoader) or isinstance(loader, _RankAwareLoader):
        return lambda: None
    if isinstance(loader.dataset, (IterDataPipe, MapDataPipe)):
        return lambda: None  # For data pipes, torch's loader would use the process group to communicate.
    shown = staticmethod(partial(ranks_in_torch_distributed, rank, world_size))
    return mixed_in(loader, _RankAwareLoader, ranks_shown=shown)
