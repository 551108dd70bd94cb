"""The lead, which ends the epochs of the run, trains on a part of each epoch."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.policies.data_leases import DataLeases
from tests.unit.policies.leasing import LeasingWorker


@given(st.integers(1, 40), st.integers(1, 7), st.lists(st.sampled_from([0, 1, 1, 1, 2]), max_size=120))
def test_lead_trains_on_a_part_of_every_epoch(items: int, unit: int, history: list[int]) -> None:
    leases = DataLeases(3)
    leases.lead(0)
    takers = [LeasingWorker(leases, worker, items, unit) for worker in range(3)]

    def step(taker: LeasingWorker) -> None:
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


def test_nothing_is_reserved_for_a_lost_lead() -> None:
    for gone in (DataLeases.park, DataLeases.forget):
        leases = DataLeases(2)
        leases.lead(0)
        other = LeasingWorker(leases, 1, 3)
        for _ in range(2):
            other.request()
        assert other.request().start == other.request().stop  # The last one is the lead's.
        gone(leases, 0)
        other.request()
        assert sorted(other.held) == [(0, 0), (0, 1), (0, 2)]


def test_epoch_of_a_single_unit_is_not_reserved() -> None:
    leases = DataLeases(2)
    leases.lead(0)
    other = LeasingWorker(leases, 1, items=3, unit=3)
    other.request()
    assert sorted(other.held) == [(0, 0), (0, 1), (0, 2)]


def test_last_free_unit_of_a_restored_epoch_is_reserved() -> None:
    """Also where another worker had opened one more when the checkpoint was written, and where it is the only one."""
    before = DataLeases(3)
    before.lead(0)
    takers = [LeasingWorker(before, worker, items=10, unit=2) for worker in range(3)]
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
    first, *others = (LeasingWorker(after, worker, items=10, unit=2) for worker in range(3))
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


def test_stream_that_does_not_end_epochs_reserves_nothing() -> None:
    leases = DataLeases(2)
    leases.lead(0)
    other = LeasingWorker(leases, 1, 2)
    for _ in range(2):
        other.request(allow_later_epoch=True)
    assert sorted(other.held) == [(0, 0), (0, 1)]


def test_several_reserved_units_are_the_last_ones_that_the_lead_gets() -> None:
    leases = DataLeases(2, reserved=3)
    leases.lead(0)
    lead, other = (LeasingWorker(leases, worker, items=20, unit=2) for worker in (0, 1))
    assert lead.request().stop <= 14
    while (lease := other.request()).start < lease.stop:
        assert lease.stop <= 14
    lease = lead.request()
    assert (lease.start, lease.stop) == (14, 20)
    assert lead.request().start == lead.request().stop
    assert len(lead.held) + len(other.held) == 20


def test_at_most_half_of_an_epoch_is_reserved() -> None:
    leases = DataLeases(2, reserved=5)
    leases.lead(0)
    other = LeasingWorker(leases, 1, items=4)
    while (lease := other.request()).start < lease.stop:
        pass
    assert sorted(other.held) == [(0, 0), (0, 1)]


def test_lost_lead_gives_back_all_reserved_units() -> None:
    for gone in (DataLeases.park, DataLeases.forget):
        leases = DataLeases(2, reserved=3)
        leases.lead(0)
        lead, other = (LeasingWorker(leases, worker, items=9) for worker in (0, 1))
        lead.request()
        gone(leases, 0)
        while (lease := other.request()).start < lease.stop:
            pass
        assert sorted({*lead.held, *other.held}) == [(0, item) for item in range(9)]
