"""A rank's buffer of leased items: the order of the items, leases requested ahead, and items reported as used."""

from __future__ import annotations

import json
import random
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from lightning_async_localsgd.policies.data_leases import DataLeases
from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.lease_source import LeaseSource
from lightning_async_localsgd.protocol.messages import Lease, LeaseRequest
from lightning_async_localsgd.runtime.leases import LeaseBuffer, LeaseClient


class DirectSource(LeaseSource):
    """Asks the lease policy directly. Answers at once or, with ``late``, when the client waits."""

    def __init__(self, policy: DataLeases, late: bool = False) -> None:
        self.policy = policy
        self.late = late
        self.checks = 0
        self.requests: list[LeaseRequest] = []
        self._unanswered: list[tuple[LeaseRequest, Future[Lease]]] = []

    @override
    def request_lease(self, request: LeaseRequest) -> Future[Lease]:
        answer: Future[Lease] = Future()
        self.requests.append(request)
        self._unanswered.append((request, answer))
        if not self.late:
            self._answer()
        return answer

    @override
    def check(self) -> None:
        self.checks += 1
        self._answer()

    def _answer(self) -> None:
        for request, answer in self._unanswered:
            answer.set_result(self.policy.grant(request, 2))
        self._unanswered.clear()


def client(policy: DataLeases, worker: int = 0) -> LeaseClient:
    return LeaseClient(DirectSource(policy), worker, f"s{worker}")


def rest_of_epoch(buffer: LeaseBuffer, epoch: int) -> list[tuple[int, int]]:
    items = []
    while (item := buffer.next(epoch)) is not None:
        items.append(item)
    return items


def test_single_rank_gets_every_epoch_in_order() -> None:
    buffer = client(DataLeases(1)).buffer("0", 10, 1)
    for epoch in range(3):
        assert rest_of_epoch(buffer, epoch) == [(epoch, item) for item in range(10)]
        assert buffer.next(epoch) is None


def test_next_lease_is_requested_when_a_lease_is_begun() -> None:
    source = DirectSource(DataLeases(1))
    buffer = LeaseClient(source, 0, "s").buffer("0", 1000, 1)
    assert buffer.next(0) == (0, 0)
    assert [request.number for request in source.requests] == [1, 2]
    while buffer.next(0) != (0, 63):
        pass
    assert len(source.requests) == 2
    assert buffer.next(0) == (0, 64)
    assert len(source.requests) == 3
    assert source.checks == 0


def test_late_answer_is_awaited_while_the_server_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async_localsgd.protocol.lease_source._CHECK_SECONDS", 0.001)
    source = DirectSource(DataLeases(1), late=True)
    buffer = LeaseClient(source, 0, "s").buffer("0", 20, 1)
    assert rest_of_epoch(buffer, 0) == [(0, item) for item in range(20)]
    assert source.checks == len(source.requests)


@given(st.integers(1, 80), st.integers(1, 4), st.randoms(use_true_random=False))
def test_ranks_of_any_speed_share_each_epoch(items: int, ranks: int, chance: random.Random) -> None:
    policy = DataLeases(ranks)
    buffers = [client(policy, rank).buffer("0", items, 1) for rank in range(ranks)]
    speeds = [chance.random() for _ in range(ranks)]
    epochs = [0] * ranks
    seen: list[tuple[int, int]] = []
    while min(epochs) < 3:
        rank = chance.choices(range(ranks), speeds)[0]
        if epochs[rank] == 3:
            speeds[rank] = 0.0
            continue
        item = buffers[rank].next(epochs[rank])
        if item is None:
            epochs[rank] += 1
        else:
            assert item[0] == epochs[rank]
            seen.append(item)
    assert sorted(seen) == [(epoch, item) for epoch in range(3) for item in range(items)]


def test_returned_items_come_in_a_later_epoch_or_when_requested_again() -> None:
    policy = DataLeases(1)
    dead, buffer = client(policy, 1).buffer("0", 10, 1), client(policy).buffer("0", 10, 1)
    assert dead.next(0) == (0, 0)
    items = rest_of_epoch(buffer, 0)
    policy.forget(1)
    returned = rest_of_epoch(buffer, 0)
    assert sorted(items + returned) == [(0, item) for item in range(10)]
    assert returned[0] == (0, 0)
    assert rest_of_epoch(buffer, 1) == [(1, item) for item in range(10)]


def test_rank_without_own_epochs_accepts_items_of_a_later_epoch() -> None:
    policy = DataLeases(2)
    fast, slow = client(policy).buffer("0", 10, 1), client(policy, 1).buffer("0", 10, 1)
    rest_of_epoch(fast, 0)
    assert fast.next(1) is not None
    assert slow.next(0) is None
    later = slow.next(0, allow_later_epoch=True)
    assert later is not None
    assert later[0] == 1
    # The buffer now holds items of epoch 1. A rank that is in epoch 0 neither gets nor loses them.
    assert slow.next(0) is None
    assert slow.next(1) is not None


def test_used_items_are_reported_once() -> None:
    leases = client(DataLeases(1))
    first, second = leases.buffer("0", 10, 1), leases.buffer("1", 10, 1)
    assert leases.items_used() == ""
    for buffer in (first, first, second):
        assert buffer.next(0) is not None
    assert leases.items_used() == ""
    first.mark_used(2)
    assert json.loads(leases.items_used()) == {"0": 2}
    second.mark_used(1)
    assert json.loads(leases.items_used()) == {"1": 1}
    assert leases.items_used() == ""
    with pytest.raises(ValueError, match="cannot mark 1 items as used: 2 were taken and 2 of them are used already"):
        first.mark_used(1)
    with pytest.raises(ValueError, match="cannot mark -1 items as used"):
        first.mark_used(-1)


def test_rest_of_a_skipped_epoch_is_dropped() -> None:
    policy = DataLeases(1)
    leases = client(policy)
    buffer = leases.buffer("0", 100, 1)
    buffer.next(0)
    with pytest.raises(ValueError, match="1 taken items must be marked as used before"):
        buffer.discard(before=1)
    buffer.mark_used(1)
    buffer.discard(before=0)
    assert buffer.used == 1
    buffer.discard(before=1)
    assert buffer.used == 13
    # The lease requested ahead is dropped, too. Items that were not leased to any worker are still to be trained on.
    assert buffer.next(1) == (0, 24)
    assert buffer.used == 24
    policy.complete_round(0, leases.items_used(), consumed=True)
    assert policy.state_dict()["0"]["free"] == [[0, 24, 100]]


def test_stream_has_one_buffer_and_keeps_its_size() -> None:
    leases = client(DataLeases(1))
    buffer = leases.buffer("0", 10, 2)
    assert leases.buffer("0", 10, 2) is buffer
    with pytest.raises(ValueError, match="'0' had 10 items in units of 2, now 11 in units of 2"):
        leases.buffer("0", 11, 2)


def test_refused_request_ends_training_with_the_reason() -> None:
    policy = DataLeases(2)
    client(policy).buffer("0", 10, 1).next(0)
    with pytest.raises(ExchangeError, match="the data of worker 1 has 11 items"):
        client(policy, 1).buffer("0", 11, 1).next(0)
