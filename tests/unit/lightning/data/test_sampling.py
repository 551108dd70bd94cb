"""Orders of epochs, and the sampler that yields their leased items."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_async_localsgd.lightning.data.sampling import (
    EpochOrder,
    can_be_leased,
    leased_loader,
    leased_sampler_of,
    why_samples_cannot_be_leased,
)

DATA = torch.arange(23)


def order(loader: DataLoader[Any], seed: int = 1) -> EpochOrder:
    return EpochOrder(loader, seed, single_worker=False)


def epoch(order: EpochOrder, number: int) -> list[Any]:
    return [order.item(number, n) for n in range(order.items)]


class Shuffling:
    """A user's sampler that draws from the global generators."""

    def __iter__(self) -> Iterator[int]:
        numbers = list(range(23))
        random.shuffle(numbers)
        return iter([numbers[i] for i in torch.randperm(23).tolist()])

    def __len__(self) -> int:
        return 23


class Leases:
    """A lease buffer that grants all items of every epoch to one rank."""

    def __init__(self, items: int) -> None:
        self.items = items
        self.used = 0
        self.at = (0, 0)

    def next(self, epoch: int, allow_later_epoch: bool = False) -> tuple[int, int] | None:
        if self.at[0] != epoch:
            self.at = (epoch, 0)
        if self.at[1] == self.items:
            return None
        self.at = (epoch, self.at[1] + 1)
        return epoch, self.at[1] - 1

    def mark_used(self, items: int) -> None:
        self.used += items

    def discard(self, before: int) -> None:
        pass


@pytest.mark.parametrize(
    ("drop_last", "items"),
    [(False, 6), (True, 5)],
)
def test_items_of_an_order_are_batches(drop_last: bool, items: int) -> None:
    batched = order(DataLoader(DATA, batch_size=4, shuffle=True, drop_last=drop_last))
    assert batched.items == items
    batches = epoch(batched, 0)
    assert all(isinstance(index, int) for batch in batches for index in batch)
    assert [len(batch) for batch in batches] == [4] * 5 + [3] * (not drop_last)
    assert len({index for batch in batches for index in batch}) == (20 if drop_last else 23)


def test_permutation_depends_only_on_seed_and_epoch() -> None:
    loader = DataLoader(DATA, batch_size=4, shuffle=True)
    torch.manual_seed(1)
    first = order(loader)
    earlier = [epoch(first, n) for n in (0, 1)]
    torch.manual_seed(2)
    second = order(loader)
    assert [epoch(second, n) for n in (1, 0)] == earlier[::-1]
    assert earlier[0] != earlier[1]
    assert epoch(order(loader, seed=7), 0) != earlier[0]
    # An epoch's order can be requested again after those of other epochs.
    assert epoch(first, 5) != epoch(first, 6)
    assert epoch(first, 0) == earlier[0]
    with torch.device("meta"):  # As after torch.set_default_device().
        assert epoch(order(loader), 0) == earlier[0]


@pytest.mark.parametrize(
    "sampler",
    [
        Shuffling(),
        WeightedRandomSampler([1.0] * 23, 23),
        RandomSampler(DATA, replacement=True, num_samples=23),
    ],
)
def test_users_sampler_has_the_same_order_on_every_rank(sampler: Any) -> None:
    loader = DataLoader(DATA, batch_size=1, sampler=sampler)
    random.seed(1)
    torch.manual_seed(1)
    mine = epoch(order(loader), 3)
    before = torch.get_rng_state()
    random.seed(2)
    torch.manual_seed(2)
    torch.rand(5)
    assert epoch(order(loader), 3) == mine
    assert epoch(order(loader), 4) != mine
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)  # The global generator is unchanged.


def test_users_own_batch_sampler_is_iterated() -> None:
    class Mirrored(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return ([n, 22 - n] for n in range(11))

        def __len__(self) -> int:
            return 11

    mirrored = order(DataLoader(DATA, batch_sampler=Mirrored(SequentialSampler(DATA), 2, False)))
    assert epoch(mirrored, 0) == [[n, 22 - n] for n in range(11)]


def test_single_worker_has_the_order_of_a_single_device() -> None:
    loader = DataLoader(DATA, batch_size=4, shuffle=True)
    torch.manual_seed(3)
    assert loader.batch_sampler is not None
    plain = list(loader.batch_sampler)
    torch.manual_seed(3)
    single = EpochOrder(loader, 1, single_worker=True)
    assert epoch(single, 0) == plain


def test_order_of_a_single_worker_is_restored_from_its_state() -> None:
    loader = DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(9))
    first = EpochOrder(loader, 1, single_worker=True)
    batches = epoch(first, 2)
    state = first.state_dict()
    again = EpochOrder(
        DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)), 1, single_worker=True
    )
    again.load_state_dict(state)
    before = torch.get_rng_state()
    assert epoch(again, 2) == batches
    assert torch.equal(torch.get_rng_state(), before)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Lengthless:
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Stateful(DataLoader[Any]):
    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Endless()),
        DataLoader(DATA, sampler=Lengthless()),
        DataLoader(DATA, sampler=DistributedSampler(DATA, num_replicas=2, rank=0)),
        Stateful(DATA),
        [1, 2, 3],
    ],
)
def test_loaders_whose_items_have_no_numbers_cannot_be_leased(loader: object) -> None:
    assert not can_be_leased(loader)


def test_leased_loader_differs_from_the_users_loader_only_in_its_items() -> None:
    class Own(DataLoader[Any]):
        pass

    own = Own(DATA, batch_size=4, shuffle=True, collate_fn=lambda batch: sum(map(int, batch)))
    leased = leased_loader(own, ranks=2, seed=1)
    sampler = leased_sampler_of(leased)
    assert isinstance(leased, Own)
    assert sampler is not None
    assert leased_sampler_of(own) is None
    assert (len(own), len(leased)) == (6, 3)
    assert leased.batch_size == 4
    # Before training there are no items, though Lightning iterates.
    assert list(leased) == []
    sampler.set_epoch(0)
    assert list(leased) == []
    leases = Leases(6)
    sampler.start(leases)  # type: ignore[arg-type]
    assert sum(leased) == sum(range(23))
    # One iteration is one epoch.
    assert list(leased) == []
    sampler.set_epoch(1)
    assert sum(leased) == sum(range(23))
    assert sum(own) == sum(range(23))


def test_skipped_items_count_as_used_in_the_next_epoch() -> None:
    leased = leased_loader(DataLoader(DATA, batch_size=4), ranks=1, seed=1, single_worker=True)
    sampler = leased_sampler_of(leased)
    assert sampler is not None
    leases = Leases(6)
    sampler.start(leases)  # type: ignore[arg-type]
    sampler.set_epoch(0)
    batches = iter(leased)
    for _ in range(3):
        next(batches)
        sampler.mark_used()
    next(batches)
    assert leases.used == 3
    sampler.set_epoch(1)
    list(leased)
    assert leases.used == 4
    for _ in range(10):  # No more items are counted than were yielded.
        sampler.mark_used()
    assert leases.used == 10


def test_iteration_that_is_not_bound_to_an_epoch_continues_with_the_next_epoch() -> None:
    leased = leased_loader(DataLoader(DATA, batch_size=4), ranks=1, seed=1, single_worker=True)
    sampler = leased_sampler_of(leased)
    assert sampler is not None
    sampler.start(Leases(6))  # type: ignore[arg-type]
    sampler.bound_to_epoch = False
    assert [len(list(leased)) for _ in range(2)] == [6, 6]
    sampler.endless = True
    endless = iter(leased)
    assert len([next(endless) for _ in range(15)]) == 15


# ---------------------------------------------------------------------------------------- batches of a rank's own size


def own_batches(loader: DataLoader[Any], size: int, epochs: int = 1) -> tuple[list[list[int]], Leases]:
    """Return the batches of a rank that takes all samples, and its leases. Each batch is used when it was yielded."""
    leased = leased_loader(loader, ranks=2, seed=1, by_samples=True)
    sampler = leased_sampler_of(leased)
    assert sampler is not None
    leases = Leases(sampler.order.items)
    sampler.start(leases)  # type: ignore[arg-type]
    sampler.batch_size = size
    found = []
    for number in range(epochs):
        sampler.set_epoch(number)
        for batch in leased:
            found.append(batch.tolist())
            assert sampler.mark_used() == len(batch)
    return found, leases


@pytest.mark.parametrize("size", [1, 4, 7, 23, 100])
def test_samples_become_batches_of_the_ranks_own_size(size: int) -> None:
    batches, leases = own_batches(DataLoader(DATA, batch_size=4, shuffle=True), size)
    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert sorted(number for batch in batches for number in batch) == DATA.tolist()
    assert leases.used == 23


def test_incomplete_batch_is_dropped_and_its_samples_count_as_used() -> None:
    batches, leases = own_batches(DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True), 6, epochs=2)
    assert [len(batch) for batch in batches] == [6] * 6, "the loader itself has 20 samples in an epoch"
    assert leases.used == 40


def test_samples_that_a_sampler_does_not_yield_count_as_used() -> None:
    class Short(Shuffling):
        def __iter__(self) -> Iterator[int]:
            return iter(range(15))

    batches, leases = own_batches(DataLoader(DATA, batch_size=4, sampler=Short()), 10)
    assert [len(batch) for batch in batches] == [10, 5]
    assert leases.used == 23


def test_length_is_that_of_the_loaders_own_batches() -> None:
    leased = leased_loader(DataLoader(DATA, batch_size=4), ranks=2, seed=1, by_samples=True)
    sampler = leased_sampler_of(leased)
    assert sampler is not None
    sampler.batch_size = 1
    assert (len(leased), sampler.order.items, sampler.order.batches) == (3, 23, 6)


def test_position_and_items_of_the_next_batch() -> None:
    leased = leased_loader(DataLoader(DATA, batch_size=4), ranks=2, seed=1, by_samples=True)
    sampler = leased_sampler_of(leased)
    assert sampler is not None
    sampler.start(Leases(23))  # type: ignore[arg-type]
    sampler.batch_size = 10
    sampler.set_epoch(0)
    iterator = iter(sampler)
    next(iterator), next(iterator)  # One is fetched ahead.
    assert (sampler.position_in(0), sampler.items_of_next) == (0, 10)
    sampler.mark_used()
    assert (sampler.position_in(0), sampler.position_in(1), sampler.items_of_next) == (10, None, 10)


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ([1, 2], "is a list, not a DataLoader"),
        (DataLoader(DATA, batch_size=None), "has batch_size=None"),
        (DataLoader(DATA, batch_sampler=[[1], [2]]), "has batches made by a list"),
        (DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 0)), "has a sampler whose samples cannot be leased"),
        (DataLoader(DATA, batch_size=4), None),
    ],
)
def test_samples_of_which_loaders_can_be_leased(loader: Any, reason: str | None) -> None:
    found = why_samples_cannot_be_leased(loader)
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")
