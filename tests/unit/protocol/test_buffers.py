"""The bounded pool of buffers for uploads and copies of the model."""

from __future__ import annotations

import pytest

from lightning_async_localsgd.protocol.buffers import BufferPool


def test_stalled_holder_does_not_count() -> None:
    now = [0.0]
    pool = BufferPool(4, max_active=1, max_total=2, stall_seconds=0.2, clock=lambda: now[0])
    first = pool.try_acquire()
    assert first is not None
    assert pool.try_acquire() is None
    now[0] = 0.3
    second = pool.try_acquire()
    assert second is not None
    now[0] = 0.6
    assert pool.try_acquire() is None, "never more than `max_total`"
    memory = second.tensor.data_ptr()
    second.release()
    third = pool.try_acquire()
    assert third is not None
    assert third.tensor.data_ptr() == memory, "released memory is used again"
    third.release()
    first.release()
    assert (pool.in_use, pool.allocated) == (0, 1)


def test_pool_grows_with_the_number_of_workers() -> None:
    now = [0.0]
    pool = BufferPool(4, max_active=1, max_total=1, clock=lambda: now[0])
    assert pool.try_acquire() is not None
    now[0] = 10.0
    assert pool.try_acquire() is None
    pool.raise_max_total(3)
    pool.raise_max_total(2)
    for seconds in (10.0, 20.0):
        now[0] = seconds
        assert pool.try_acquire() is not None
    now[0] = 30.0
    assert pool.try_acquire() is None


def test_slow_holder_does_not_count_even_if_it_makes_progress() -> None:
    now = [0.0]
    pool = BufferPool(4, clock=lambda: now[0])
    first = pool.try_acquire()
    assert first is not None
    for tenth in range(1, 11):
        now[0] = tenth / 10
        first.record_progress()
        if tenth < 10:
            assert pool.try_acquire() is None
    assert pool.try_acquire() is not None


def test_complete_buffer_counts_until_its_next_use() -> None:
    now = [0.0]
    pool = BufferPool(4, clock=lambda: now[0])
    lease = pool.try_acquire()
    assert lease is not None
    lease.mark_complete()
    now[0] = 100.0
    assert pool.try_acquire() is None
    lease.restart()
    assert pool.try_acquire() is None
    now[0] = 101.0
    assert pool.try_acquire() is not None


@pytest.mark.parametrize(("limit", "most"), [(0, 2), (3, 2)])
def test_invalid_pool_size_is_refused(limit: int, most: int) -> None:
    with pytest.raises(ValueError, match="1 <= max_active <= max_total"):
        BufferPool(4, max_active=limit, max_total=most)
