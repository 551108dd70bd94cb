"""Leases of a coordinator: items count with their push. If it is refused or its worker is lost, they are free again."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_async_localsgd.protocol.messages import ALREADY_APPLIED, NOT_FINITE, Lease, LeaseRequest
from lightning_async_localsgd.server.coordinator import Coordinator
from tests.harness import LAYOUT, Workers, hello, make_coordinator


def ask(coordinator: Coordinator, worker: int, number: int, session: str | None = None) -> Lease:
    return coordinator.lease(LeaseRequest(worker, session or f"s{worker}", number, "0", 40, 1, 0, False))


def free(coordinator: Coordinator) -> list[list[int]]:
    found: list[list[int]] = coordinator.state_dict()["leases"]["0"]["free"]
    return found


def test_items_count_with_their_push_and_are_free_again_when_it_is_refused() -> None:
    coordinator = make_coordinator(workers=1)
    workers = Workers(coordinator)
    workers.join_all(1)
    assert ask(coordinator, 0, 1) == Lease(1, 0, 0, 10, None)
    push = workers.send(0, 1.0, items_used='{"0":3}')
    workers.dispatch(1.0)
    assert free(coordinator) == [[0, 3, 40]]
    assert coordinator.push(push, torch.ones(LAYOUT.numel), 1.5) is None
    assert workers.dispatch(1.5)[0].refused == ALREADY_APPLIED
    assert free(coordinator) == [[0, 3, 40]]
    workers.send(0, 2.0, torch.full((LAYOUT.numel,), float("nan")), items_used='{"0":5}')
    assert workers.dispatch(2.0)[0].refused.startswith(NOT_FINITE)
    assert free(coordinator) == [[0, 5, 40]]
    # A round that is refused is lost with what was learnt from its items: they are for others, and it goes on.
    workers.send(0, 3.0, base_version=77, items_used='{"0":8}')
    workers.dispatch(3.0)
    assert ask(coordinator, 0, 2).start == 5
    workers.send(0, 4.0, items_used='{"0":10}')
    assert workers.dispatch(4.0)[0].refused is None
    assert free(coordinator) == [[0, 5, 8], [0, 10, 40]]


@pytest.mark.parametrize("used", ['{"0":11}', '{"1":1}', "{", "[1]", '{"0":-1}'])
def test_push_that_claims_items_it_was_not_leased_is_refused(used: str) -> None:
    coordinator = make_coordinator(workers=1)
    workers = Workers(coordinator)
    workers.join_all(1)
    ask(coordinator, 0, 1)
    workers.send(0, 1.0, items_used=used)
    assert "items" in (workers.dispatch(1.0)[0].refused or "")
    assert coordinator.model.version == 0
    assert free(coordinator) == [[0, 0, 40]]
    workers.send(0, 2.0, items_used='{"0":10}')
    assert workers.dispatch(2.0)[0].refused is None
    assert free(coordinator) == [[0, 10, 40]]


def test_leases_of_a_session_end_with_it() -> None:
    coordinator = make_coordinator(workers=2)
    workers = Workers(coordinator)
    workers.join_all(2)
    ask(coordinator, 0, 1)
    assert coordinator.join(hello(0, "newer"), 1.0) is None
    workers.dispatch(1.0)
    assert "is not active" in (ask(coordinator, 0, 2).refused or "")
    assert "is not active" in (ask(coordinator, 7, 1).refused or "")
    workers.send(0, 2.0, items_used='{"0":2}')
    assert free(coordinator) == [[0, 0, 40]]
    # The newer session counts its requests and its items from the beginning.
    first = ask(coordinator, 0, 1, "newer")
    assert first.refused is None
    workers.sequences[0] = 0
    workers.send(0, 3.0, session="newer", items_used=json.dumps({"0": first.stop - first.start}))
    assert workers.dispatch(3.0)[0].refused is None


def test_worker_without_a_connection_gets_leases_and_comes_back_with_its_items() -> None:
    coordinator = make_coordinator(workers=2)
    workers = Workers(coordinator)
    workers.join_all(2)
    first = ask(coordinator, 0, 1)
    coordinator.leave(0, "s0", 1.0, "its connection ended")
    second = ask(coordinator, 0, 2)
    assert second.refused is None
    assert coordinator.join(hello(0, reconnecting=True), 2.0) is None
    count = first.stop - first.start + second.stop - second.start
    workers.send(0, 3.0, items_used=json.dumps({"0": count}))
    assert workers.dispatch(3.0)[0].refused is None
    assert sum(stop - start for _, start, stop in free(coordinator)) == 40 - count


def test_worker_that_comes_back_too_late_loses_one_round_and_continues() -> None:
    coordinator = make_coordinator(workers=2)
    workers = Workers(coordinator)
    workers.join_all(2)
    ask(coordinator, 0, 1)
    coordinator.leave(0, "s0", 1.0, "its connection ended")
    count, number = 0, 0
    while True:
        number += 1
        lease = ask(coordinator, 1, number)
        if lease.start == lease.stop:
            break
        count += lease.stop - lease.start
    assert count == 40
    assert coordinator.join(hello(0, reconnecting=True), 2.0) is None
    workers.send(0, 3.0, items_used='{"0":5}')
    assert "leased to other workers" in (workers.dispatch(3.0)[0].refused or "")
    workers.send(1, 4.0, items_used='{"0":40}')
    assert workers.dispatch(4.0)[1].refused is None
    assert free(coordinator) == []
    workers.send(0, 5.0)
    assert workers.dispatch(5.0)[0].refused is None


def test_positions_in_the_data_are_saved_and_may_be_missing() -> None:
    coordinator = make_coordinator(workers=1)
    workers = Workers(coordinator)
    workers.join_all(1)
    ask(coordinator, 0, 1)
    workers.send(0, 1.0, items_used='{"0":4}')
    state = coordinator.state_dict()
    later = make_coordinator(workers=1)
    later.load_state_dict(state)
    Workers(later).join_all(1)
    assert ask(later, 0, 1).start == 4
    del state["leases"]
    without = make_coordinator(workers=1)
    without.load_state_dict(state)
    Workers(without).join_all(1)
    assert ask(without, 0, 1).start == 0
