"""Sessions of workers: the transitions of their state machine, and the table of sessions."""

from __future__ import annotations

import pytest

from lightning_async_localsgd.server.sessions import SessionState, SessionTable, WorkerSession


def computing() -> WorkerSession:
    session = WorkerSession("s")
    session.dispatch(version=3, local_steps=5, now=10.0)
    return session


def resting() -> WorkerSession:
    session = WorkerSession("s")
    session.rest()
    return session


def test_dispatch_starts_a_round() -> None:
    session = computing()
    assert session.state is SessionState.COMPUTING
    assert (session.version, session.local_steps, session.dispatched_at) == (3, 5, 10.0)
    assert list(session.bases) == [3]


@pytest.mark.parametrize("session", [computing(), resting()])
def test_only_a_waiting_worker_is_dispatched_or_rests(session: WorkerSession) -> None:
    with pytest.raises(AssertionError):
        session.dispatch(version=4, local_steps=5, now=11.0)
    with pytest.raises(AssertionError):
        session.rest()


def test_arrival_ends_the_round_and_returns_its_duration() -> None:
    session = computing()
    session.interrupt(11.0)
    assert session.arrive(12.5) == 2.5
    assert session.waiting
    assert not session.interrupted
    assert session.arrived_at == 12.5


def test_interruption_does_not_count_as_part_of_the_round() -> None:
    session = computing()
    session.interrupt(11.0)
    session.interrupt(12.0)
    assert session.interrupted
    session.continue_round(14.0)
    session.continue_round(15.0)
    assert session.arrive(16.0) == 3.0


def test_round_of_a_worker_that_did_not_wait_begins_with_its_push() -> None:
    session = computing()
    session.overlap_steps = 4
    session.arrive(20.0)
    session.begun_steps = 4
    session.interrupt(21.0)
    session.dispatch(version=4, local_steps=5, now=23.0, overlap_steps=2)
    assert session.overlapped
    assert session.interrupted, "it still validates"
    session.continue_round(25.0)
    assert session.arrive(30.0) == 10.0 - 4.0
    assert not session.overlapped


def test_resting_worker_wakes_unless_it_has_pushed_its_last_round() -> None:
    session = resting()
    session.wake()
    assert session.waiting
    session.rest()
    session.final = True
    session.wake()
    assert session.resting
    working = computing()
    working.wake()
    assert working.computing


def test_worker_that_lost_its_connection_pushes_again() -> None:
    session = WorkerSession("s")
    session.expect_push_again()
    assert session.computing
    idle = resting()
    idle.expect_push_again()
    assert idle.resting


def test_lost_dispatch_is_given_again() -> None:
    for session in (computing(), resting()):
        session.dispatch_again()
        assert session.waiting


def test_ended_session_is_remembered_as_replaced_until_its_worker_is_forgotten() -> None:
    table = SessionTable(cohort=2)
    table.enter(0, "first", 0.0)
    table.enter(0, "second", 1.0)
    assert table.find(0, "first") is None
    assert table.is_replaced(0, "first")
    table.depart(0)
    assert table.find(0, "second") is None
    assert table.find_departed(0, "second") is not None
    assert table.departed == {0}
    assert table.bring_back(0).id == "second"
    table.forget(0)
    assert not table.is_replaced(0, "first")
    assert (table.missing, table.new_number(), table.knows(2), table.knows(3)) == ([1], 2, True, False)
