"""Shards are drawn by equation 2 of the paper, and leases shrink towards the end of an epoch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.policies.data_leases import DataLeases
from lightning_async_localsgd.policies.leased_epochs import LARGEST_LEASE, shard_weights, shards
from lightning_async_localsgd.protocol.messages import Lease
from tests.unit.policies.leasing import LeasingWorker, ask


@given(st.integers(0, 500), st.integers(1, 7), st.integers(1, 9))
def test_shards_are_the_whole_order_in_equal_parts_of_whole_units(items: int, unit: int, count: int) -> None:
    parts = shards(items, unit, count)
    assert len(parts) == count
    assert [item for start, stop in parts for item in range(start, stop)] == list(range(items))
    assert all(stop % unit == 0 or stop == items for _, stop in parts)
    units = [-(-(stop - start) // unit) for start, stop in parts]
    assert max(units) - min(units) <= 1


def test_weights_equal_equation_2() -> None:
    assert shard_weights([50, 50], [0, 0]) == [50, 50]
    assert shard_weights([50, 50], [10, 10]) == [50, 50]
    assert shard_weights([50, 50], [10, 0]) == [0, 500]
    # p = max(|D_i| / 100 - n_i / 20, 0) = (0.6 - 0.5, 0.3 - 0.35, 0.1 - 0.15), times 100 * 20.
    assert shard_weights([60, 30, 10], [10, 7, 3]) == [200, 0, 0]


@given(st.integers(1, 3000), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.lists(st.integers(0, 5)))
def test_over_represented_shard_is_never_drawn(items: int, unit: int, count: int, seed: int, order: list[int]) -> None:
    """Invariant 5: after every lease the shards' shares agree to that one lease."""
    leases = DataLeases(count, seed)
    parts = shards(items, unit, count)
    sizes = [stop - start for start, stop in parts]
    taken = [0] * count
    takers = [LeasingWorker(leases, worker, items, unit) for worker in range(6)]
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


def test_single_worker_keeps_the_order() -> None:
    taker = LeasingWorker(DataLeases(1), 0, 1000)
    while len(taker.held) < 1000:
        taker.request(workers=1)
    assert taker.held == [(0, item) for item in range(1000)]


def test_leases_shrink_towards_the_end_and_are_whole_units() -> None:
    taker = LeasingWorker(DataLeases(1), 0, 10_003, unit=4)
    sizes = []
    while (lease := taker.request(workers=2)).start < lease.stop:
        sizes.append(lease.stop - lease.start)
    assert sizes[0] == 4 * LARGEST_LEASE
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 3
    assert all(size % 4 == 0 for size in sizes[:-1])


def test_ordered_data_is_leased_from_its_beginning() -> None:
    leases = DataLeases(4)
    starts = [leases.grant(ask(worker=n % 3, number=1 + n // 3, ordered=True), 3).start for n in range(20)]
    assert starts == sorted(starts)
    assert starts[0] == 0
    starts = [leases.grant(ask(worker=n % 3, number=1 + n // 3, stream="1"), 3).start for n in range(20)]
    assert starts != sorted(starts)
