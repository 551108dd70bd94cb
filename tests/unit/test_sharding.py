"""Each item of an epoch in one applied push, whatever workers do, and shards drawn as equation 2 says."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.messages import Lease, LeaseRequest
from lightning_async_localsgd.sharding import (
    LARGEST_LEASE,
    MAX_NAME,
    MAX_OPEN,
    MAX_STREAMS,
    DataLeases,
    Ranges,
    shard_weights,
    shards,
)


def ask(worker: int = 0, number: int = 1, epoch: int = 0, items: int = 100, **changes: object) -> LeaseRequest:
    values = {"stream": "0", "unit": 1, "any_later": False, **changes}
    return LeaseRequest(worker=worker, session="s", number=number, items=items, epoch=epoch, **values)  # type: ignore[arg-type]


def used(count: int, stream: str = "0") -> str:
    return json.dumps({stream: count})


class Taker:
    """A worker of one stream that keeps what it is given, as a rank does."""

    def __init__(self, leases: DataLeases, worker: int, items: int, unit: int = 1) -> None:
        self.leases = leases
        self.worker = worker
        self.items = items
        self.unit = unit
        self.epoch = 0
        self.restart()

    def restart(self) -> None:
        self.number = 0
        self.held: list[tuple[int, int]] = []
        """Items of this session, in order."""
        self.trained = 0
        self.handed_in = 0

    def request(self, again: bool = False, any_later: bool = False, workers: int = 2) -> Lease:
        self.number += not again
        request = ask(self.worker, self.number, self.epoch, self.items, unit=self.unit, any_later=any_later)
        lease = self.leases.grant(request, workers)
        assert lease.refused is None
        if not again:
            self.held += [(lease.epoch, item) for item in range(lease.start, lease.stop)]
        return lease

    def train(self, most: int) -> None:
        self.trained = min(len(self.held), self.trained + most)

    def push(self, wanted: bool = True) -> list[tuple[int, int]]:
        """What a server does with a push; ``wanted`` False is one refused for another reason. Returns what counted."""
        claim = used(self.trained)
        applied = wanted and self.leases.objection(self.worker, claim) is None
        self.leases.settle(self.worker, claim, consumed=applied)
        items = self.held[self.handed_in : self.trained]
        self.handed_in = self.trained
        return items if applied else []


# ---------------------------------------------------------------------- ranges


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 12), st.integers(1, 9)), max_size=40))
def test_ranges_are_a_set_of_integers(history: list[tuple[bool, int, int, int]]) -> None:
    ranges, expected = Ranges(), set[int]()
    for adding, start, length, most in history:
        window = set(range(start, start + length))
        if adding and window & expected:
            with pytest.raises(ValueError, match="overlaps"):
                ranges.add(start, start + length)
        elif adding:
            ranges.add(start, start + length)
            expected |= window
        elif window & expected:
            first, last = ranges.take(most, start, start + length)
            taken = set(range(first, last))
            assert taken <= window & expected
            assert first == min(window & expected)
            assert 1 <= len(taken) <= most
            expected -= taken
        assert ranges.within(start, start + length) == len(window & expected)
        assert ranges.size == len(expected)
        assert {item for first, last in ranges.spans for item in range(first, last)} == expected
        assert all(before[1] < after[0] for before, after in zip(ranges.spans, ranges.spans[1:], strict=False))


@given(st.integers(0, 500), st.integers(1, 7), st.integers(1, 9))
def test_shards_are_the_whole_order_in_equal_parts_of_whole_units(items: int, unit: int, count: int) -> None:
    parts = shards(items, unit, count)
    assert len(parts) == count
    assert [item for start, stop in parts for item in range(start, stop)] == list(range(items))
    assert all(stop % unit == 0 or stop == items for _, stop in parts)
    units = [-(-(stop - start) // unit) for start, stop in parts]
    assert max(units) - min(units) <= 1


# ------------------------------------------------------------------ equation 2


def test_the_weights_are_those_of_equation_2() -> None:
    assert shard_weights([50, 50], [0, 0]) == [50, 50]
    assert shard_weights([50, 50], [10, 10]) == [50, 50]
    assert shard_weights([50, 50], [10, 0]) == [0, 500]
    # p = max(|D_i| / 100 - n_i / 20, 0) = (0.6 - 0.5, 0.3 - 0.35, 0.1 - 0.15), times 100 * 20.
    assert shard_weights([60, 30, 10], [10, 7, 3]) == [200, 0, 0]


@given(st.integers(1, 3000), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.lists(st.integers(0, 5)))
def test_an_over_represented_shard_is_never_drawn(
    items: int, unit: int, count: int, seed: int, order: list[int]
) -> None:
    """Invariant 5: after every lease the shards' shares agree to that one lease."""
    leases = DataLeases(count, seed)
    parts = shards(items, unit, count)
    sizes = [stop - start for start, stop in parts]
    taken = [0] * count
    takers = [Taker(leases, worker, items, unit) for worker in range(6)]
    largest = 0
    while sum(taken) < items:
        lease = takers[order.pop() if order else 0].request(workers=count)
        drawn = next(at for at, (start, stop) in enumerate(parts) if start <= lease.start < stop)
        assert lease.stop <= parts[drawn][1], "no lease crosses the end of a shard"
        assert taken[drawn] * items <= sizes[drawn] * sum(taken)
        largest = max(largest, lease.stop - lease.start)
        taken[drawn] += lease.stop - lease.start
        for size, number in zip(sizes, taken, strict=True):
            share = size * sum(taken) / items
            assert share - largest * (count - 1) - 1e-6 <= number <= share + largest + 1e-6
    assert takers[0].request() == Lease(takers[0].number, 0, 0, 0, None)


def test_draws_depend_on_seed_stream_and_epoch_only() -> None:
    def starts(seed: int, stream: str, epoch: int) -> list[int]:
        leases = DataLeases(4, seed)
        return [leases.grant(ask(0, n, epoch, stream=stream), 4).start for n in range(1, 30)]

    assert starts(1, "a", 0) == starts(1, "a", 0)
    assert len({tuple(starts(*place)) for place in [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]}) == 4


def test_one_worker_takes_the_order_as_it_is() -> None:
    taker = Taker(DataLeases(1), 0, 1000)
    while len(taker.held) < 1000:
        taker.request(workers=1)
    assert taker.held == [(0, item) for item in range(1000)]


def test_leases_shrink_towards_the_end_and_are_whole_units() -> None:
    taker = Taker(DataLeases(1), 0, 10_003, unit=4)
    sizes = []
    while (lease := taker.request(workers=2)).start < lease.stop:
        sizes.append(lease.stop - lease.start)
    assert sizes[0] == 4 * LARGEST_LEASE
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 3
    assert all(size % 4 == 0 for size in sizes[:-1])


# ----------------------------------------------------------------- exactly once

EPOCHS = 3
ACTIONS = ["request", "again", "train", "push", "refused", "leave", "return", "restart", "save"]
events = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3), st.integers(1, 9)), max_size=80)


class Run:
    """Four workers that train on some epochs, with everything that may go wrong."""

    def __init__(self, items: int, unit: int, count: int) -> None:
        self.leases = DataLeases(count, seed=7)
        self.count = count
        self.takers = [Taker(self.leases, worker, items, unit) for worker in range(4)]
        self.away: set[int] = set()
        self.consumed: Counter[tuple[int, int]] = Counter()

    def act(self, action: str, worker: int, amount: int) -> None:
        taker = self.takers[worker]
        if action == "request":
            lease = taker.request(any_later=amount == 9)  # One whose connection is lost goes on asking.
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
@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 4), events)
def test_every_item_is_in_exactly_one_applied_push(
    items: int, unit: int, count: int, history: list[tuple[str, int, int]]
) -> None:
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
def test_a_restored_server_goes_on_as_the_saved_one(
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


def test_a_worker_behind_is_told_that_its_epoch_is_over_and_catches_up() -> None:
    leases = DataLeases(2)
    fast, slow = Taker(leases, 0, 10), Taker(leases, 1, 10)
    while (lease := fast.request()).start < lease.stop:
        pass
    fast.epoch = 1
    assert fast.request().epoch == 1
    assert slow.request() == Lease(1, 0, 0, 0, None)
    assert slow.request(any_later=True).epoch == 1
    slow.epoch = 1
    lease = slow.request()
    assert (lease.epoch, lease.start < lease.stop) == (1, True)


def test_an_epoch_is_not_skipped_however_far_ahead_a_worker_claims_to_be() -> None:
    leases = DataLeases(1)
    taker = Taker(leases, 0, 4)
    taker.request()
    taker.epoch = 5
    while len(taker.held) < 24:
        taker.request()
    assert taker.held == [(epoch, item) for epoch in range(6) for item in range(4)]


def test_items_of_a_dead_worker_come_first_and_merged() -> None:
    leases = DataLeases(1)
    dead, heir = Taker(leases, 0, 40), Taker(leases, 1, 40)
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


def test_what_a_lost_worker_holds_is_kept_for_it_as_long_as_there_is_something_else() -> None:
    leases = DataLeases(1)
    lost, other = Taker(leases, 0, 40), Taker(leases, 1, 40)
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
    objection = leases.objection(0, used(lost.trained))
    assert objection is not None
    assert "went to others" in objection.text
    assert lost.push() == []
    other.train(40)
    assert len(other.push()) == 38
    assert leases.state_dict()["0"]["free"] == []


def test_a_lost_worker_that_asks_is_never_given_its_own_items_again() -> None:
    leases = DataLeases(1)
    lost = Taker(leases, 0, 3)
    leases.park(0)
    for _ in range(5):
        lost.request(workers=0)
    assert lost.held == [(0, 0), (0, 1), (0, 2)]


def test_a_refused_push_gives_its_items_back() -> None:
    leases = DataLeases(1)
    taker = Taker(leases, 0, 100)
    first = taker.request()
    taker.train(5)
    assert taker.push(wanted=False) == []
    assert leases.state_dict()["0"]["free"] == [[0, 0, 100]]
    assert taker.request().start == 0
    taker.train(first.stop)
    assert taker.push() == [*((0, item) for item in range(5, first.stop)), *((0, item) for item in range(5))]


def test_a_request_that_comes_again_gets_the_same_answer_and_an_older_one_none() -> None:
    leases = DataLeases(2)
    first = leases.grant(ask(0, 1), 2)
    assert leases.grant(ask(0, 1), 5) == first
    second = leases.grant(ask(0, 2), 2)
    assert (second.epoch, second.start) != (first.epoch, first.start)
    assert "answered long ago" in (leases.grant(ask(0, 1), 2).refused or "")
    # Another stream's requests are other ones, though they are counted together.
    assert leases.grant(ask(0, 3, stream="1"), 2).refused is None
    assert leases.grant(ask(0, 2), 2) == second


def test_other_data_than_the_others_is_refused_by_name() -> None:
    leases = DataLeases(2)
    leases.grant(ask(0, items=100), 2)
    refused = leases.grant(ask(1, items=90), 2).refused
    assert refused is not None
    assert "the data of worker 1 has 90 items in units of 1 (data stream '0'), that of the others 100" in refused
    assert "units of 2" in (leases.grant(ask(1, unit=2), 2).refused or "")
    assert leases.grant(ask(1), 2).refused is None


@pytest.mark.parametrize("changes", [{"items": -1}, {"unit": 0}, {"epoch": -1}])
def test_impossible_requests_are_refused(changes: dict[str, int]) -> None:
    leases = DataLeases(1)
    assert "cannot have" in (leases.grant(ask(**changes), 1).refused or "")  # type: ignore[arg-type]
    assert leases.state_dict() == {}


def test_no_items_at_all_are_an_epoch_that_is_over() -> None:
    leases = DataLeases(2)
    for epoch in range(3):
        assert leases.grant(ask(number=epoch + 1, epoch=epoch, items=0), 2) == Lease(epoch + 1, epoch, 0, 0, None)


def test_a_checkpoint_of_other_data_begins_the_epoch_anew(caplog: pytest.LogCaptureFixture) -> None:
    saved = DataLeases(2)
    saved.grant(ask(items=100), 2)
    leases = DataLeases(3)
    leases.load_state_dict(saved.state_dict())
    with caplog.at_level(logging.WARNING, "lightning_async_localsgd"):
        assert leases.grant(ask(items=50, epoch=4), 2).epoch == 4
    assert "50 items in units of 1, in the checkpoint it had 100" in caplog.text
    assert leases.state_dict()["0"]["shards"] == 3
    assert "that of the others 50" in (leases.grant(ask(1, items=100), 2).refused or "")


@pytest.mark.parametrize("count", [1, 3, 8])
def test_another_number_of_workers_goes_on_with_the_epoch(count: int) -> None:
    saved = DataLeases(4)
    before = Taker(saved, 0, 50)
    for _ in range(3):
        before.request()
    before.train(7)
    done = before.push()
    leases = DataLeases(count)
    leases.load_state_dict(saved.state_dict())
    taker = Taker(leases, 0, 50)
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
def test_claims_that_cannot_be_are_refused_and_change_nothing(claim: str) -> None:
    leases = DataLeases(1)
    leases.grant(ask(), 1)
    before = leases.state_dict()
    objection = leases.objection(0, claim)
    assert objection is not None
    assert len(objection.text) < 400
    for consumed in (False, True):
        leases.settle(0, claim, consumed)
    assert leases.state_dict() == before
    assert leases.objection(0, "") is None
    assert leases.objection(0, "{}") is None


def test_streams_are_bounded_and_the_least_recently_asked_one_goes() -> None:
    leases = DataLeases(1)
    for number in range(MAX_STREAMS):
        assert leases.grant(ask(0, number + 1, stream=str(number)), 1).refused is None
    # All of them have open leases: they are in use.
    assert f"{MAX_STREAMS} data loaders at once" in (leases.grant(ask(0, 100, stream="more"), 1).refused or "")
    for number in (0, 5, 7):
        granted = leases.grant(ask(0, number + 1, stream=str(number)), 1)
        leases.settle(0, used(granted.stop, str(number)), consumed=True)
    # Stream 5 was asked for before 7; of 0 something is open again.
    leases.grant(ask(0, 101, stream="0"), 1)
    assert leases.grant(ask(0, 102, stream="more"), 1).refused is None
    assert len(leases.state_dict()) == MAX_STREAMS
    assert "was retired" in (leases.grant(ask(0, 103, stream="5"), 1).refused or "")
    assert leases.grant(ask(0, 103, stream="7"), 1).refused is None
    assert leases.objection(0, used(1, "5")) is not None


def test_names_are_short_enough_for_a_push_to_name_all_streams() -> None:
    leases = DataLeases(1)
    assert leases.grant(ask(stream="x" * (MAX_NAME - 2)), 1).refused is None
    for name in ("x" * (MAX_NAME - 1), "\u1234" * 27):
        assert "may have" in (leases.grant(ask(stream=name), 1).refused or "")


def test_a_worker_that_only_asks_is_stopped() -> None:
    leases = DataLeases(1)
    for number in range(1, MAX_OPEN + 1):
        assert leases.grant(ask(0, number, epoch=number - 1, items=1), 1).refused is None
    refused = leases.grant(ask(0, MAX_OPEN + 1, epoch=MAX_OPEN, items=1), 1).refused
    assert refused is not None
    assert "has not handed in" in refused


# ------------------------------------------------------------------------ lead


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.lists(st.sampled_from([0, 1, 1, 1, 2]), max_size=120))
def test_the_lead_has_a_part_of_every_epoch(items: int, unit: int, history: list[int]) -> None:
    leases = DataLeases(3)
    leases.lead(0)
    takers = [Taker(leases, worker, items, unit) for worker in range(3)]

    def step(taker: Taker) -> None:
        lease = taker.request()
        if lease.start == lease.stop:
            taker.epoch += 1

    for worker in history:
        step(takers[worker])
    last = max(taker.epoch for taker in takers)
    while any(taker.epoch <= last for taker in takers):
        step(min(takers, key=lambda taker: (taker.epoch, -taker.worker)))
    counts = Counter(item for taker in takers for item in taker.held)
    if items > unit:
        assert {epoch for epoch, _ in takers[0].held} >= set(range(last + 1))
    for epoch in range(last + 1):
        assert [counts[epoch, item] for item in range(items)] == [1] * items


def test_nothing_is_kept_for_a_lead_that_is_gone() -> None:
    for gone in (DataLeases.park, DataLeases.forget):
        leases = DataLeases(2)
        leases.lead(0)
        other = Taker(leases, 1, 3)
        for _ in range(2):
            other.request()
        assert other.request().start == other.request().stop  # The last one is the lead's.
        gone(leases, 0)
        other.request()
        assert sorted(other.held) == [(0, 0), (0, 1), (0, 2)]


def test_of_an_epoch_of_one_unit_nothing_is_kept_for_the_lead() -> None:
    leases = DataLeases(2)
    leases.lead(0)
    other = Taker(leases, 1, items=3, unit=3)
    other.request()
    assert sorted(other.held) == [(0, 0), (0, 1), (0, 2)]


def test_of_restored_epochs_the_last_unit_that_is_left_is_the_leads() -> None:
    """Also where another worker had opened one more when the checkpoint was written, and where it is the only one."""
    before = DataLeases(3)
    before.lead(0)
    takers = [Taker(before, worker, items=10, unit=2) for worker in range(3)]
    while takers[1].epoch == 0:
        lease = takers[1].request()
        takers[1].train(1000)
        takers[1].push()
        takers[1].epoch += lease.start == lease.stop
    takers[1].request()
    takers[1].train(1000)
    takers[1].push()
    saved = before.state_dict()
    assert {epoch for epoch, _, _ in saved["0"]["free"]} == {0, 1}

    after = DataLeases(3)
    after.load_state_dict(saved)
    after.lead(0)
    first, *others = (Taker(after, worker, items=10, unit=2) for worker in range(3))
    for taker in others:
        lease = taker.request()
        assert lease.start == lease.stop, "what is left of the first epoch is the lead's"
        taker.epoch = 1
        while (lease := taker.request()).start < lease.stop:
            pass
    for epoch in range(2):
        first.epoch = epoch
        assert first.request().epoch == epoch
    assert {epoch for epoch, _ in first.held} == {0, 1}
    left = sum(stop - start for _, start, stop in saved["0"]["free"])
    assert len(first.held) + sum(len(taker.held) for taker in others) == left


def test_a_stream_that_does_not_end_epochs_keeps_nothing_for_the_lead() -> None:
    leases = DataLeases(2)
    leases.lead(0)
    other = Taker(leases, 1, 2)
    for _ in range(2):
        other.request(any_later=True)
    assert sorted(other.held) == [(0, 0), (0, 1)]


def test_what_is_ordered_is_handed_out_from_its_beginning() -> None:
    leases = DataLeases(4)
    starts = [leases.grant(ask(worker=n % 3, number=1 + n // 3, ordered=True), 3).start for n in range(20)]
    assert starts == sorted(starts)
    assert starts[0] == 0
    starts = [leases.grant(ask(worker=n % 3, number=1 + n // 3, stream="1"), 3).start for n in range(20)]
    assert starts != sorted(starts)
