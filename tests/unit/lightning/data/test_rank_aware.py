"""Loaders whose datasets learn their rank from ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe

from lightning_async_localsgd.lightning.data.rank_aware import make_rank_aware


class Asking(IterableDataset[tuple[int, int]]):
    """Asks before each sample."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for _ in range(3):
            yield ranks()


class Pipe(IterDataPipe[tuple[int, int]]):
    """Asks before its only sample."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield ranks()


def ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_dataset_learns_its_rank_until_restored(workers: int) -> None:
    loader = DataLoader(
        Asking(), batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    restore = make_rank_aware(loader, 1, 3)
    assert type(loader).__name__ == "DataLoader"
    for batch in loader:
        assert tuple(batch) == (1, 3)
        assert not dist.is_initialized(), "training itself has no process group"
    make_rank_aware(loader, 2, 3)()
    assert [tuple(batch) for batch in loader] == [(1, 3)] * 3, "a second call changes nothing"
    restore()
    assert [tuple(batch) for batch in loader] == [(0, 1)] * 3


def test_data_pipes_and_other_iterables_stay_as_they_are() -> None:
    loader = DataLoader(Pipe(), batch_size=None)
    make_rank_aware(loader, 1, 3)
    assert type(loader) is DataLoader
    assert [tuple(sample) for sample in loader] == [(0, 1)]
    make_rank_aware([1, 2], 1, 3)()
