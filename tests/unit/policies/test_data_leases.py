"""Each item of an epoch in one applied push, whatever workers do, and shards drawn as equation 2 says."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.policies.data_leases import MAX_NAME, MAX_OPEN, MAX_STREAMS, DataLeases
from lightning_async_localsgd.protocol.messages import Lease
from tests.unit.policies.leasing import LeasingWorker, ask, used

# ----------------------------------------------------------------- exactly once

EPOCHS = 3
ACTIONS = ["request", "again", "train", "push", "refused", "leave", "return", "restart", "save"]
events = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3), st.integers(1, 9)), max_size=80)


class Run:
    """Four workers that train on some epochs, with everything that may go wrong.

    Args:
        items: items of an epoch.
        unit: items that are leased together, or those of each worker.
        count: number of shards.

    """

    def __init__(self, items: int, unit: int | list[int], count: int) -> None:
        self.leases = DataLeases(count, seed=7)
        self.count = count
        own = isinstance(unit, list)
        units = unit if isinstance(unit, list) else [unit] * 4
        self.takers = [LeasingWorker(self.leases, worker, items, units[worker], own) for worker in range(4)]
        self.away: set[int] = set()
        self.consumed: Counter[tuple[int, int]] = Counter()

    def act(self, action: str, worker: int, amount: int) -> None:
        taker = self.takers[worker]
        if action == "request":
            lease = taker.request(allow_later_epoch=amount == 9)  # One whose connection is lost goes on asking.
            if lease.start == lease.stop:
                taker.epoch = min(taker.epoch + 1, EPOCHS - 1)
        elif action == "again" and taker.number:
            before = taker.held[-1:]
            lease = taker.request(again=True)
            assert lease.start == lease.stop or before == [(lease.epoch, lease.stop - 1)]
        elif action == "train":
            taker.train(amount)
        elif action in ("push", "refused") and worker not in self.away:
            self.consumed.update(taker.push(wanted=action == "push"))
        elif action == "leave" and worker not in self.away:
            self.away.add(worker)
            self.leases.park(worker)
        elif action == "return" and worker in self.away:
            self.away.discard(worker)
            self.leases.unpark(worker)
        elif action == "restart":
            self.away.discard(worker)
            self.leases.forget(worker)
            taker.restart()
        elif action == "save" and amount == 9:
            state = json.loads(json.dumps(self.leases.state_dict()))
            self.leases = DataLeases(self.count, seed=7)
            self.leases.load_state_dict(state)
            self.away.clear()
            for other in self.takers:
                other.leases = self.leases
                other.restart()
        assert max(self.consumed.values(), default=1) == 1, "an item is in two applied pushes"

    def drain(self) -> None:
        """Those who are left go on until there is nothing more to do."""
        if len(self.away) == len(self.takers):
            self.act("restart", 0, 1)
        busy = True
        while busy:
            busy = False
            for taker in self.takers:
                if taker.worker in self.away:
                    continue
                lease = taker.request()
                taker.train(len(taker.held))
                busy = busy or taker.trained > taker.handed_in or taker.epoch < EPOCHS - 1
                if lease.start == lease.stop:
                    taker.epoch = min(taker.epoch + 1, EPOCHS - 1)
                self.act("push", taker.worker, 1)


@settings(max_examples=300)
@given(
    st.integers(1, 60),
    st.integers(1, 3) | st.lists(st.integers(1, 20), min_size=4, max_size=4),
    st.integers(1, 4),
    events,
)
def test_every_item_is_in_exactly_one_applied_push(
    items: int, unit: int | list[int], count: int, history: list[tuple[str, int, int]]
) -> None:
    """With a list, workers join, die and restart that have batches of their own sizes."""
    run = Run(items, unit, count)
    for event in history:
        run.act(*event)
    run.drain()
    # Those who were away come back with what they have, though others have done everything.
    for worker in sorted(run.away):
        run.act("return", worker, 1)
        run.act("train", worker, items)
        run.act("push", worker, 1)
    run.drain()
    assert run.consumed == Counter({(epoch, item): 1 for epoch in range(EPOCHS) for item in range(items)})


@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 4), events)
def test_restored_leases_continue_like_the_saved_ones(
    items: int, unit: int, count: int, history: list[tuple[str, int, int]]
) -> None:
    run = Run(items, unit, count)
    for event in history:
        run.act(*event)
    state = json.loads(json.dumps(run.leases.state_dict()))
    restored = DataLeases(count, seed=7)
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    for worker in range(4):
        run.leases.forget(worker)
    if not state:
        return
    first = max(run.takers[worker].epoch for worker in range(4))
    for number in range(1, 60):
        request = ask(number % 4, number, min(first + number // 20, EPOCHS), items, unit=unit)
        assert restored.grant(request, 3) == run.leases.grant(request, 3)


# -------------------------------------------------------------------- scenarios


def test_slow_worker_learns_that_its_epoch_is_over_and_catches_up() -> None:
    leases = DataLeases(2)
    fast, slow = LeasingWorker(leases, 0, 10), LeasingWorker(leases, 1, 10)
    while (lease := fast.request()).start < lease.stop:
        pass
    fast.epoch = 1
    assert fast.request().epoch == 1
    assert slow.request() == Lease(1, 0, 0, 0, None)
    assert slow.request(allow_later_epoch=True).epoch == 1
    slow.epoch = 1
    lease = slow.request()
    assert (lease.epoch, lease.start < lease.stop) == (1, True)


def test_no_epoch_is_skipped_whatever_epoch_a_worker_claims() -> None:
    leases = DataLeases(1)
    taker = LeasingWorker(leases, 0, 4)
    taker.request()
    taker.epoch = 5
    while len(taker.held) < 24:
        taker.request()
    assert taker.held == [(epoch, item) for epoch in range(6) for item in range(4)]


def test_items_of_a_dead_worker_are_leased_first_as_one_range() -> None:
    leases = DataLeases(1)
    dead, heir = LeasingWorker(leases, 0, 40), LeasingWorker(leases, 1, 40)
    while (lease := dead.request()).start < lease.stop:
        pass
    assert len(dead.held) == 40
    dead.train(13)
    dead.push()
    assert leases.state_dict()["0"]["free"] == [[0, 13, 40]]
    leases.forget(0)
    heir.epoch = 1
    assert heir.request(workers=1) == Lease(1, 0, 13, 20, None)
    while heir.held[-1][0] == 0:
        heir.request()
    assert heir.held[:28] == [*((0, item) for item in range(13, 40)), (1, 0)]


def test_items_of_a_lost_worker_are_parked_while_other_items_are_free() -> None:
    leases = DataLeases(1)
    lost, other = LeasingWorker(leases, 0, 40), LeasingWorker(leases, 1, 40)
    lost.request()
    lost.train(2)
    leases.park(0)
    other.request()
    leases.unpark(0)
    assert lost.push() == [(0, 0), (0, 1)]
    leases.park(0)
    while (lease := other.request()).start < lease.stop:
        pass
    assert sorted(other.held) == [(0, item) for item in range(2, 40)]
    # It comes back with a round that others have been given since.
    leases.unpark(0)
    lost.train(1)
    rejection = leases.rejection(0, used(lost.trained))
    assert rejection is not None
    assert "leased to other workers" in rejection.text
    assert lost.push() == []
    other.train(40)
    assert len(other.push()) == 38
    assert leases.state_dict()["0"]["free"] == []


def test_lost_worker_is_never_leased_its_own_items_again() -> None:
    leases = DataLeases(1)
    lost = LeasingWorker(leases, 0, 3)
    leases.park(0)
    for _ in range(5):
        lost.request(workers=0)
    assert lost.held == [(0, 0), (0, 1), (0, 2)]


def test_items_of_a_refused_push_become_free() -> None:
    leases = DataLeases(1)
    taker = LeasingWorker(leases, 0, 100)
    first = taker.request()
    taker.train(5)
    assert taker.push(wanted=False) == []
    assert leases.state_dict()["0"]["free"] == [[0, 0, 100]]
    assert taker.request().start == 0
    taker.train(first.stop)
    assert taker.push() == [*((0, item) for item in range(5, first.stop)), *((0, item) for item in range(5))]


def test_repeated_request_gets_the_same_answer_and_an_older_one_is_refused() -> None:
    leases = DataLeases(2)
    first = leases.grant(ask(0, 1), 2)
    assert leases.grant(ask(0, 1), 5) == first
    second = leases.grant(ask(0, 2), 2)
    assert (second.epoch, second.start) != (first.epoch, first.start)
    assert "older than the last one" in (leases.grant(ask(0, 1), 2).refused or "")
    # Another stream's requests are other ones, though they are counted together.
    assert leases.grant(ask(0, 3, stream="1"), 2).refused is None
    assert leases.grant(ask(0, 2), 2) == second


def test_different_data_on_one_worker_is_refused() -> None:
    leases = DataLeases(2)
    leases.grant(ask(0, items=100), 2)
    refused = leases.grant(ask(1, items=90), 2).refused
    assert refused is not None
    assert (
        "the data of worker 1 has 90 items in units of 1 (data stream '0'), but the data of the others has 100"
        in refused
    )
    assert "units of 2" in (leases.grant(ask(1, unit=2), 2).refused or "")
    assert leases.grant(ask(1), 2).refused is None


@pytest.mark.parametrize("changes", [{"items": -1}, {"unit": 0}, {"epoch": -1}])
def test_impossible_requests_are_refused(changes: dict[str, int]) -> None:
    leases = DataLeases(1)
    assert "cannot have" in (leases.grant(ask(**changes), 1).refused or "")  # type: ignore[arg-type]
    assert leases.state_dict() == {}


def test_epoch_without_items_is_over() -> None:
    leases = DataLeases(2)
    for epoch in range(3):
        assert leases.grant(ask(number=epoch + 1, epoch=epoch, items=0), 2) == Lease(epoch + 1, epoch, 0, 0, None)


def test_checkpoint_of_other_data_restarts_the_epoch(caplog: pytest.LogCaptureFixture) -> None:
    saved = DataLeases(2)
    saved.grant(ask(items=100), 2)
    leases = DataLeases(3)
    leases.load_state_dict(saved.state_dict())
    with caplog.at_level(logging.WARNING, "lightning_async_localsgd"):
        assert leases.grant(ask(items=50, epoch=4), 2).epoch == 4
    assert "50 items in units of 1, but in the checkpoint it had 100" in caplog.text
    assert leases.state_dict()["0"]["shards"] == 3
    assert "but the data of the others has 50" in (leases.grant(ask(1, items=100), 2).refused or "")


@pytest.mark.parametrize("count", [1, 3, 8])
def test_another_number_of_workers_continues_the_epoch(count: int) -> None:
    saved = DataLeases(4)
    before = LeasingWorker(saved, 0, 50)
    for _ in range(3):
        before.request()
    before.train(7)
    done = before.push()
    leases = DataLeases(count)
    leases.load_state_dict(saved.state_dict())
    taker = LeasingWorker(leases, 0, 50)
    while (lease := taker.request(workers=count)).start < lease.stop:
        pass
    assert sorted(done + taker.held) == [(0, item) for item in range(50)]
    taker.epoch = 1
    taker.request()
    assert leases.state_dict()["0"]["shards"] == count


# ----------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    "claim",
    ["[]", "{", "[" * 10_000, '{"0": 1.5}', '{"0": true}', '{"0": "1"}', "null", '{"0": -1}', '{"0": 99}', '{"1": 1}'],
)
def test_impossible_claims_are_refused_and_change_nothing(claim: str) -> None:
    leases = DataLeases(1)
    leases.grant(ask(), 1)
    before = leases.state_dict()
    rejection = leases.rejection(0, claim)
    assert rejection is not None
    assert len(rejection.text) < 400
    for consumed in (False, True):
        leases.complete_round(0, claim, consumed)
    assert leases.state_dict() == before
    assert leases.rejection(0, "") is None
    assert leases.rejection(0, "{}") is None


def test_number_of_streams_is_bounded_and_the_least_recently_requested_is_replaced() -> None:
    leases = DataLeases(1)
    for number in range(MAX_STREAMS):
        assert leases.grant(ask(0, number + 1, stream=str(number)), 1).refused is None
    # All of them have open leases: they are in use.
    assert f"at most {MAX_STREAMS} data loaders" in (leases.grant(ask(0, 100, stream="more"), 1).refused or "")
    for number in (0, 5, 7):
        granted = leases.grant(ask(0, number + 1, stream=str(number)), 1)
        leases.complete_round(0, used(granted.stop, str(number)), consumed=True)
    # Stream 5 was asked for before 7; of 0 something is open again.
    leases.grant(ask(0, 101, stream="0"), 1)
    assert leases.grant(ask(0, 102, stream="more"), 1).refused is None
    assert len(leases.state_dict()) == MAX_STREAMS
    assert "was replaced" in (leases.grant(ask(0, 103, stream="5"), 1).refused or "")
    assert leases.grant(ask(0, 103, stream="7"), 1).refused is None
    assert leases.rejection(0, used(1, "5")) is not None


def test_stream_names_are_limited_so_that_a_push_can_name_all_streams() -> None:
    leases = DataLeases(1)
    assert leases.grant(ask(stream="x" * (MAX_NAME - 2)), 1).refused is None
    for name in ("x" * (MAX_NAME - 1), "\u1234" * 27):
        assert "is longer than" in (leases.grant(ask(stream=name), 1).refused or "")


def test_worker_that_requests_without_pushing_is_refused() -> None:
    leases = DataLeases(1)
    for number in range(1, MAX_OPEN + 1):
        assert leases.grant(ask(0, number, epoch=number - 1, items=1), 1).refused is None
    refused = leases.grant(ask(0, MAX_OPEN + 1, epoch=MAX_OPEN, items=1), 1).refused
    assert refused is not None
    assert "has not pushed" in refused


def test_leases_are_whole_units_of_the_worker_that_asks() -> None:
    leases = DataLeases(1)
    small, large = (LeasingWorker(leases, worker, 100, unit, own_unit=True) for worker, unit in enumerate([4, 24]))
    lengths = {small: [], large: []}  # type: dict[LeasingWorker, list[int]]
    while sum(map(sum, lengths.values())) < 100:
        for worker, found in lengths.items():
            lease = worker.request()
            found.append(lease.stop - lease.start)
    assert all(length % 4 == 0 for length in lengths[small][:-1])
    assert all(length % 24 == 0 for length in lengths[large] if length >= 24)
    assert max(lengths[large]) >= 24 > max(lengths[small])


def test_own_units_are_no_contradiction_but_other_numbers_of_samples_are() -> None:
    leases = DataLeases(2)
    assert leases.grant(ask(0, items=100, unit=8, own_unit=True), 2).refused is None
    assert leases.grant(ask(1, items=100, unit=3, own_unit=True), 2).refused is None
    refused = leases.grant(ask(2, items=90, unit=3, own_unit=True), 2).refused
    assert refused is not None
    assert "worker 2 has 90 items" in refused
    refused = leases.grant(ask(3, items=100, unit=8), 2).refused
    assert refused is not None
    assert "units of 8" in refused


def test_position_in_an_epoch_is_restored_with_other_sizes() -> None:
    leases = DataLeases(1)
    first = LeasingWorker(leases, 0, 50, 8, own_unit=True)
    before = first.request()
    first.train(50)
    first.push()
    restored = DataLeases(1)
    restored.load_state_dict(json.loads(json.dumps(leases.state_dict())))
    lease = restored.grant(ask(0, items=50, unit=3, own_unit=True), 1)
    assert (lease.epoch, lease.start) == (0, before.stop)


def test_lead_has_a_step_of_its_own_size_in_every_epoch() -> None:
    leases = DataLeases(2, lead_unit=12)
    leases.lead(0)
    fast = LeasingWorker(leases, 1, 60, 5, own_unit=True)
    while (lease := fast.request()).start < lease.stop:
        fast.train(60)
        fast.push()
    host = LeasingWorker(leases, 0, 60, 12, own_unit=True)
    lease = host.request()
    assert (lease.start, lease.stop) == (48, 60)
