"""A rank's stock of leased items: the order it hands out, what it asks ahead, what it says it has used."""

from __future__ import annotations

import json
import random
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.exchange import Exchange, ExchangeError
from lightning_async_localsgd.leases import LeaseDesk, LeaseStock
from lightning_async_localsgd.messages import Hello, Lease, LeaseRequest, Push, Reply
from lightning_async_localsgd.sharding import DataLeases


class Direct(Exchange):
    """Asks a server's policy; the answer comes when it is waited for, or at once."""

    def __init__(self, leases: DataLeases, late: bool = False) -> None:
        super().__init__()
        self.leases = leases
        self.late = late
        self.waits = 0
        self.requests: list[LeaseRequest] = []
        self._unanswered: list[tuple[LeaseRequest, Future[Lease]]] = []

    def _send_request(self, request: LeaseRequest, answer: Future[Lease]) -> None:
        self.requests.append(request)
        self._unanswered.append((request, answer))
        if not self.late:
            self.answer()

    def answer(self) -> None:
        for request, answer in self._unanswered:
            answer.set_result(self.leases.grant(request, 2))
        self._unanswered.clear()

    def check(self) -> None:
        self.waits += 1
        self.answer()

    def join(self, hello: Hello, model: torch.Tensor) -> Reply:
        raise NotImplementedError

    def push(self, push: Push, gradient: torch.Tensor, model: torch.Tensor) -> Reply:
        raise NotImplementedError

    @property
    def wanted_version(self) -> int:
        return -1

    def close(self) -> None:
        raise NotImplementedError


def desk(leases: DataLeases, worker: int = 0) -> LeaseDesk:
    return LeaseDesk(Direct(leases), worker, f"s{worker}")


def rest_of(stock: LeaseStock, epoch: int) -> list[tuple[int, int]]:
    found = []
    while (item := stock.next(epoch)) is not None:
        found.append(item)
    return found


def test_one_rank_goes_through_epoch_after_epoch_in_order() -> None:
    stock = desk(DataLeases(1)).stock("0", 10, 1)
    for epoch in range(3):
        assert rest_of(stock, epoch) == [(epoch, item) for item in range(10)]
        assert stock.next(epoch) is None


def test_the_following_lease_is_asked_for_when_one_is_begun() -> None:
    exchange = Direct(DataLeases(1))
    stock = LeaseDesk(exchange, 0, "s").stock("0", 1000, 1)
    assert stock.next(0) == (0, 0)
    assert [request.number for request in exchange.requests] == [1, 2]
    while stock.next(0) != (0, 63):
        pass
    assert len(exchange.requests) == 2
    assert stock.next(0) == (0, 64)
    assert len(exchange.requests) == 3
    assert exchange.waits == 0


def test_an_answer_that_is_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async_localsgd.exchange._LOOK_SECONDS", 0.001)
    exchange = Direct(DataLeases(1), late=True)
    stock = LeaseDesk(exchange, 0, "s").stock("0", 20, 1)
    assert rest_of(stock, 0) == [(0, item) for item in range(20)]
    assert exchange.waits == len(exchange.requests)


@given(st.integers(1, 80), st.integers(1, 4), st.randoms(use_true_random=False))
def test_ranks_of_any_speed_share_each_epoch(items: int, ranks: int, chance: random.Random) -> None:
    leases = DataLeases(ranks)
    stocks = [desk(leases, rank).stock("0", items, 1) for rank in range(ranks)]
    speeds = [chance.random() for _ in range(ranks)]
    epochs = [0] * ranks
    seen: list[tuple[int, int]] = []
    while min(epochs) < 3:
        rank = chance.choices(range(ranks), speeds)[0]
        if epochs[rank] == 3:
            speeds[rank] = 0.0
            continue
        found = stocks[rank].next(epochs[rank])
        if found is None:
            epochs[rank] += 1
        else:
            assert found[0] == epochs[rank]
            seen.append(found)
    assert sorted(seen) == [(epoch, item) for epoch in range(3) for item in range(items)]


def test_what_others_gave_back_comes_in_a_later_epoch_or_when_asked_again() -> None:
    leases = DataLeases(1)
    dead, stock = desk(leases, 1).stock("0", 10, 1), desk(leases).stock("0", 10, 1)
    assert dead.next(0) == (0, 0)
    found = rest_of(stock, 0)
    leases.forget(1)
    again = rest_of(stock, 0)
    assert sorted(found + again) == [(0, item) for item in range(10)]
    assert again[0] == (0, 0)
    assert rest_of(stock, 1) == [(1, item) for item in range(10)]


def test_any_later_epoch_will_do_for_a_rank_that_follows() -> None:
    leases = DataLeases(2)
    fast, slow = desk(leases).stock("0", 10, 1), desk(leases, 1).stock("0", 10, 1)
    rest_of(fast, 0)
    assert fast.next(1) is not None
    assert slow.next(0) is None
    later = slow.next(0, any_later=True)
    assert later is not None
    assert later[0] == 1
    # What is in stock now is of epoch 1: a rank that is in epoch 0 after all has none of it, nor loses it.
    assert slow.next(0) is None
    assert slow.next(1) is not None


def test_used_items_are_told_once_in_the_push_that_holds_them() -> None:
    desk_ = desk(DataLeases(1))
    first, second = desk_.stock("0", 10, 1), desk_.stock("1", 10, 1)
    assert desk_.used() == ""
    for stock in (first, first, second):
        assert stock.next(0) is not None
    assert desk_.used() == ""
    first.mark_used(2)
    assert json.loads(desk_.used()) == {"0": 2}
    second.mark_used(1)
    assert json.loads(desk_.used()) == {"1": 1}
    assert desk_.used() == ""
    with pytest.raises(ValueError, match="1 items cannot be used: 2 were taken and 2 of them used"):
        first.mark_used(1)
    with pytest.raises(ValueError, match="cannot be used"):
        first.mark_used(-1)


def test_the_rest_of_an_epoch_that_is_skipped_is_dropped() -> None:
    leases = DataLeases(1)
    desk_ = desk(leases)
    stock = desk_.stock("0", 100, 1)
    stock.next(0)
    with pytest.raises(ValueError, match="1 items that were taken must be used before"):
        stock.discard(before=1)
    stock.mark_used(1)
    stock.discard(before=0)
    assert stock.used == 1
    stock.discard(before=1)
    assert stock.used == 13
    # What had been asked for is dropped, too; what nobody had been given is still to be trained on.
    assert stock.next(1) == (0, 24)
    assert stock.used == 24
    leases.settle(0, desk_.used(), consumed=True)
    assert leases.state_dict()["0"]["free"] == [[0, 24, 100]]


def test_a_stock_is_the_same_whenever_it_is_asked_for_and_keeps_its_numbers() -> None:
    desk_ = desk(DataLeases(1))
    stock = desk_.stock("0", 10, 2)
    assert desk_.stock("0", 10, 2) is stock
    with pytest.raises(ValueError, match="'0' had 10 items in units of 2, now 11 in units of 2"):
        desk_.stock("0", 11, 2)


def test_a_refusal_ends_training_with_its_reason() -> None:
    leases = DataLeases(2)
    desk(leases).stock("0", 10, 1).next(0)
    with pytest.raises(ExchangeError, match="the data of worker 1 has 11 items"):
        desk(leases, 1).stock("0", 11, 1).next(0)
