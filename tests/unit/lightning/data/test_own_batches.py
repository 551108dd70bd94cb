"""Each sample in one merged batch of every epoch, whatever the batch sizes are, and whoever dies or joins."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_async_localsgd.lightning.data.sampling import leased_loader, leased_sampler_of
from lightning_async_localsgd.policies.data_leases import DataLeases
from lightning_async_localsgd.protocol.lease_source import LeaseSource
from lightning_async_localsgd.protocol.messages import Lease, LeaseRequest
from lightning_async_localsgd.runtime.leases import LeaseClient

EPOCHS = 3


class Direct(LeaseSource):
    """Answers at once."""

    def __init__(self, leases: DataLeases) -> None:
        self.leases = leases

    @override
    def request_lease(self, request: LeaseRequest) -> Future[Lease]:
        answer: Future[Lease] = Future()
        answer.set_result(self.leases.grant(request, 3))
        return answer

    @override
    def check(self) -> None:
        return


class Rank:
    """Trains on the batches that a leased loader gives, and pushes at times."""

    def __init__(self, leases: DataLeases, number: int, samples: int, batch: tuple[int, int], reference: int) -> None:
        self.leases, self.number, self.batch = leases, number, batch
        loader = DataLoader(torch.arange(samples), batch_size=reference, shuffle=True)
        sampler = leased_sampler_of(leased_loader(loader, ranks=3, seed=5, by_samples=True))
        assert sampler is not None
        self.client = LeaseClient(Direct(leases), number, "s")
        size, accumulate = batch
        sampler.start(self.client.buffer("0", samples, size * accumulate, own_unit=True))
        sampler.batch_size = size
        self.sampler = sampler
        self.epoch = -1
        self.trained: list[int] = []
        self.sizes: list[int] = []
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self.sampler.set_epoch(self.epoch)
        self.iterator = iter(self.sampler)

    def step(self) -> bool:
        """Train on a batch. Return whether there was one, or another epoch has begun."""
        batch = next(self.iterator, None)
        if batch is not None:
            assert self.sampler.mark_used() == len(batch)
            self.trained += batch
            self.sizes.append(len(batch))
        elif self.epoch < EPOCHS - 1:
            self._begin_epoch()
        else:
            self.sampler.set_epoch(self.epoch)  # Items may have come back from a dead rank.
            self.iterator = iter(self.sampler)
            return False
        return True

    def push(self) -> list[int]:
        claim = self.client.items_used()
        assert self.leases.rejection(self.number, claim) is None
        self.leases.complete_round(self.number, claim, consumed=True)
        trained, self.trained = self.trained, []
        return trained


batches = st.tuples(st.integers(1, 17), st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(
    samples=st.integers(1, 90),
    sizes=st.lists(batches, min_size=1, max_size=5),
    reference=st.integers(1, 16),
    history=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["step", "step", "push", "die"])), max_size=80),
)
def test_each_sample_is_merged_once_an_epoch(
    samples: int, sizes: list[tuple[int, int]], reference: int, history: list[tuple[int, str]]
) -> None:
    """Ranks join with their first event, and die with what they have not pushed."""
    leases = DataLeases(3, seed=2, lead_unit=sizes[0][0] * sizes[0][1])
    leases.lead(0)
    merged: Counter[int] = Counter()
    ranks: dict[int, Rank] = {}

    def rank(number: int) -> Rank:
        if number not in ranks:
            ranks[number] = Rank(leases, number, samples, sizes[number], reference)
        return ranks[number]

    for number, event in history:
        number %= len(sizes)
        if event == "step":
            rank(number).step()
        elif event == "push":
            merged.update(rank(number).push())
        elif ranks.pop(number, None) is not None:
            leases.forget(number)
    for number in range(len(sizes)):
        rank(number)
    busy = True
    while busy:
        stepped = [one.step() for one in ranks.values()]
        busy = any(stepped)
        for one in ranks.values():
            merged.update(one.push())
    assert merged == Counter(dict.fromkeys(range(samples), EPOCHS))
    for number, one in ranks.items():
        assert max(one.sizes, default=0) <= sizes[number][0]
