"""The owner thread with real workers in other threads of one process."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.buffers import BufferLease, BufferPool
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.layout import Binding, Layout
from lightning_async_localsgd.leases import LeaseDesk
from lightning_async_localsgd.local_exchange import LocalExchange
from lightning_async_localsgd.merging import Merging
from lightning_async_localsgd.messages import PROTOCOL_VERSION, Facts, Hello, LeaseRequest, Push, Reply
from lightning_async_localsgd.outer import DelayedNesterov, Nesterov, OuterOptimizer
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.records import Settled
from lightning_async_localsgd.server import About, Server
from lightning_async_localsgd.worker import Worker


def build(
    workers: int,
    total: int | None,
    threaded: bool = True,
    rule: OuterOptimizer | None = None,
    quorum: int | Literal["all"] = 1,
) -> Server:
    module = torch.nn.Linear(4, 3)
    layout = Layout.of(module)
    model = GlobalModel(layout, rule or DelayedNesterov(), workers)
    Binding(layout, module).read(model.theta)
    merging = Merging(model, workers, quorum)
    coordinator = Coordinator(
        model, SpeedAwareSteps(5), GraceWindow("auto"), Budget(total), workers, "this", merging=merging
    )
    return Server(coordinator, BufferPool(layout.numel), threaded=threaded)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    opened: list[Server] = []
    yield opened
    for server in opened:
        server.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("async_localsgd")]


def train(worker: Worker, module: torch.nn.Module, seconds: float) -> None:
    """What a rank's loop does, without Lightning."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(worker.number)
    worker.join()
    while not worker.stopped:
        inputs = torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        (module(inputs) - inputs[:, :3]).square().mean().backward()
        optimizer.step()
        time.sleep(seconds)
        worker.count_step()
        worker.end_step(samples=8)
        if worker.due:
            worker.end_round()


def run_all(server: Server, workers: int) -> tuple[list[torch.nn.Module], list[Worker]]:
    modules = [torch.nn.Linear(4, 3) for _ in range(workers)]
    layout = server.layout
    everyone = [Worker(n, Binding(layout, module), LocalExchange(server)) for n, module in enumerate(modules)]
    threads = [
        threading.Thread(target=train, args=(worker, module, 0.001 * (1 + 2 * worker.number)))
        for worker, module in zip(everyone, modules, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return modules, everyone


def test_workers_of_unequal_speed_share_the_budget_and_end_with_the_same_bits(servers: list[Server]) -> None:
    server = build(workers=3, total=300)
    servers.append(server)
    modules, workers = run_all(server, 3)
    first = modules[0].state_dict()
    for module in modules[1:]:
        assert all(torch.equal(first[name], tensor) for name, tensor in module.state_dict().items())
    assert sum(worker.total_steps for worker in workers) == 300
    assert workers[0].total_steps > workers[2].total_steps
    totals = server.totals()
    assert {n: t.steps for n, t in totals.items()} == {w.number: w.total_steps for w in workers}
    assert all(t.samples == 8 * t.steps for t in totals.values())
    model = torch.empty(server.layout.numel)
    assert server.copy_model(model) == server.view.version == sum(t.rounds for t in totals.values())
    assert torch.equal(server.layout.views(model)["weight"], first["weight"])


def test_a_quorum_of_all_merges_whole_rounds(servers: list[Server]) -> None:
    server = build(workers=3, total=300, rule=Nesterov(lr=0.7), quorum="all")
    servers.append(server)
    modules, workers = run_all(server, 3)
    first = modules[0].state_dict()
    for module in modules[1:]:
        assert all(torch.equal(first[name], tensor) for name, tensor in module.state_dict().items())
    assert sum(worker.total_steps for worker in workers) == 300
    totals = server.totals()
    # Near the end there may be no step left for the last one.
    rounds = [worker.rounds for worker in totals.values()]
    assert max(rounds) - min(rounds) <= 1
    assert all(worker.staleness == 0 for worker in totals.values())
    assert server.buffers.in_use == 0


def test_a_world_of_one_has_no_thread(servers: list[Server]) -> None:
    server = build(workers=1, total=23, threaded=False)
    servers.append(server)
    module = torch.nn.Linear(4, 3)
    worker = Worker(0, Binding(server.layout, module), LocalExchange(server))
    before = set(threading.enumerate())
    train(worker, module, 0.0)
    assert set(threading.enumerate()) == before
    assert worker.total_steps == 23
    assert server.view.version == 5


class Recorder:
    """An outlet that keeps what it was given."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.leases: list[BufferLease] = []
        self.refusals: list[str] = []
        self.told = threading.Event()

    def dispatch(self, reply: Reply, lease: BufferLease) -> None:
        self.replies.append(reply)
        self.leases.append(lease)
        self.told.set()

    def refuse(self, reason: str) -> None:
        self.refusals.append(reason)
        self.told.set()


def test_distant_workers_share_one_snapshot_and_the_pool_gets_it_back(servers: list[Server]) -> None:
    server = build(workers=2, total=100)
    servers.append(server)
    outlets = [Recorder(), Recorder()]
    for number, outlet in enumerate(outlets):
        server.join(Hello(PROTOCOL_VERSION, number, f"s{number}", server.layout.fingerprint), outlet)
    assert all(outlet.told.wait(10) for outlet in outlets)
    assert outlets[0].leases[0] is outlets[1].leases[0]
    model = torch.empty(server.layout.numel)
    server.copy_model(model)
    assert torch.equal(outlets[0].leases[0].tensor, model)
    assert server.buffers.in_use == 1
    outlets[0].leases[0].release()
    assert server.buffers.in_use == 1
    outlets[1].leases[0].release()
    assert server.buffers.in_use == 0
    with pytest.raises(RuntimeError, match="more often"):
        outlets[1].leases[0].release()


def test_a_dispatch_waits_for_a_buffer_without_stopping_the_server(servers: list[Server]) -> None:
    server = build(workers=1, total=100)
    servers.append(server)
    held = server.buffers.try_acquire()
    assert held is not None
    assert server.buffers.try_acquire() is None
    outlet = Recorder()
    server.join(Hello(PROTOCOL_VERSION, 0, "s", server.layout.fingerprint), outlet)
    assert server.ask(lambda coordinator: coordinator.live) == [0]
    held.release()
    assert outlet.told.wait(10)
    assert outlet.replies[0].local_steps == 5


def test_a_holder_that_stalls_does_not_count() -> None:
    now = [0.0]
    pool = BufferPool(4, limit=1, most=2, stall_seconds=0.2, clock=lambda: now[0])
    first = pool.try_acquire()
    assert first is not None
    assert pool.try_acquire() is None
    now[0] = 0.3
    second = pool.try_acquire()
    assert second is not None
    now[0] = 0.6
    assert pool.try_acquire() is None, "never more than `most`"
    memory = second.tensor.data_ptr()
    second.release()
    third = pool.try_acquire()
    assert third is not None
    assert third.tensor.data_ptr() == memory, "whoever is quick goes on with memory that is there"
    third.release()
    first.release()
    assert (pool.in_use, pool.allocated) == (0, 1)


def test_a_pool_grows_with_the_workers_who_may_stall() -> None:
    now = [0.0]
    pool = BufferPool(4, limit=1, most=1, clock=lambda: now[0])
    assert pool.try_acquire() is not None
    now[0] = 10.0
    assert pool.try_acquire() is None
    pool.allow(3)
    pool.allow(2)
    for seconds in (10.0, 20.0):
        now[0] = seconds
        assert pool.try_acquire() is not None
    now[0] = 30.0
    assert pool.try_acquire() is None


def test_a_holder_behind_a_slow_link_does_not_count_though_it_moves() -> None:
    now = [0.0]
    pool = BufferPool(4, clock=lambda: now[0])
    first = pool.try_acquire()
    assert first is not None
    for tenth in range(1, 11):
        now[0] = tenth / 10
        first.touch()
        if tenth < 10:
            assert pool.try_acquire() is None
    assert pool.try_acquire() is not None


def test_what_waits_for_the_server_counts_until_its_next_use() -> None:
    now = [0.0]
    pool = BufferPool(4, clock=lambda: now[0])
    lease = pool.try_acquire()
    assert lease is not None
    lease.settle()
    now[0] = 100.0
    assert pool.try_acquire() is None
    lease.renew()
    assert pool.try_acquire() is None
    now[0] = 101.0
    assert pool.try_acquire() is not None


@pytest.mark.parametrize(("limit", "most"), [(0, 2), (3, 2)])
def test_a_pool_of_impossible_size_is_refused(limit: int, most: int) -> None:
    with pytest.raises(ValueError, match="1 <= limit <= most"):
        BufferPool(4, limit=limit, most=most)


class Broken(DelayedNesterov):
    def step(self, gradient: torch.Tensor, views: object) -> None:
        gradient.neg_()
        raise RuntimeError("the rule broke")


def test_a_failure_of_the_owner_reaches_everybody_who_waits(servers: list[Server]) -> None:
    server = build(workers=1, total=100, rule=Broken())
    servers.append(server)
    module = torch.nn.Linear(4, 3)
    worker = Worker(0, Binding(server.layout, module), LocalExchange(server))
    worker.join()
    worker.count_step()
    with pytest.raises(RuntimeError, match="the rule broke"):
        worker.end_round()
    with pytest.raises(RuntimeError, match="the rule broke"):
        server.raise_failure()
    late = Recorder()
    server.join(Hello(PROTOCOL_VERSION, 1, "late", server.layout.fingerprint), late)
    assert late.told.wait(10)
    assert "the rule broke" in late.refusals[0]
    # A step was broken off: nobody goes on from what it has left behind.
    with pytest.raises(RuntimeError, match="the rule broke"):
        server.state_dict()
    with pytest.raises(RuntimeError, match="the rule broke"):
        server.copy_model(torch.empty(server.layout.numel))
    assert server.totals()[0].rounds == 0
    # What fails after that is not the reason.
    server.lease(ask(), lambda lease: 1 / 0)
    server.ask(lambda coordinator: coordinator.live)
    with pytest.raises(RuntimeError, match="the rule broke"):
        server.raise_failure()


def test_a_world_of_one_has_no_state_after_a_failure(servers: list[Server]) -> None:
    server = build(workers=1, total=100, threaded=False, rule=Broken())
    servers.append(server)
    worker = Worker(0, Binding(server.layout, torch.nn.Linear(4, 3)), LocalExchange(server))
    worker.join()
    assert server.state_dict()["model"]["version"] == 0
    worker.count_step()
    with pytest.raises(RuntimeError, match="the rule broke"):
        worker.end_round()
    with pytest.raises(RuntimeError, match="the rule broke"):
        server.state_dict()


def test_the_final_model_goes_on_to_its_worker_when_the_server_ends() -> None:
    server = build(workers=2, total=10)
    outlets = begin(server, 2)
    for number, outlet in enumerate(outlets):
        outlet.told.clear()
        server.push(push_of(number, 1, 0), filled(server), outlet)
    assert all(outlet.told.wait(10) for outlet in outlets)
    assert server.finished
    server.close()
    for outlet in outlets:
        assert outlet.replies[-1].stop
        assert outlet.refusals == []
        outlet.leases.pop().release()


def test_a_closed_server_refuses_those_who_wait_and_releases_what_it_holds(servers: list[Server]) -> None:
    server = build(workers=2, total=100)
    outlet = Recorder()
    server.join(Hello(PROTOCOL_VERSION, 0, "s", server.layout.fingerprint), outlet)
    assert server.missing == [1]
    lease = server.buffers.try_acquire()
    push = Push(0, "s", 1, "this", 0, 1, 1, 0, 0.0, 0.0, False, False)
    server.push(push, lease, outlet)
    server.close("the end of the test")
    assert outlet.refusals == ["the end of the test"]
    assert server.buffers.in_use == 0
    with pytest.raises(RuntimeError, match="closed"):
        server.ask(lambda coordinator: coordinator.live)


# ---------------------------------------------------------------- data leases


@pytest.mark.parametrize("quorum", [1, 2, "all"])
def test_workers_of_unequal_speed_share_each_epoch(servers: list[Server], quorum: int | Literal["all"]) -> None:
    server = build(workers=3, total=None, rule=DelayedNesterov() if quorum == 1 else Nesterov(lr=0.7), quorum=quorum)
    servers.append(server)
    seen: list[list[tuple[int, int]]] = [[], [], []]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            worker = Worker(number, Binding(server.layout, torch.nn.Linear(4, 3)), LocalExchange(server))
            desk = LeaseDesk(worker.exchange, number, worker.session)
            worker.used = desk.used
            stock = desk.stock("0", 100, 1)
            worker.join()
            for epoch in range(2):
                while (item := stock.next(epoch)) is not None:
                    seen[number].append(item)
                    stock.mark_used(1)
                    time.sleep(0.0005 * (1 + 4 * number))
                    worker.count_step()
                    worker.end_step(samples=1)
                    if worker.due:
                        worker.end_round()
            worker.end_round(final=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not failures
    expected = [(epoch, item) for epoch in range(2) for item in range(100)]
    assert sorted(item for items in seen for item in items) == expected
    assert server.state_dict()["leases"]["0"]["free"] == []
    assert sum(totals.steps for totals in server.totals().values()) == 200


def ask(session: str = "s") -> LeaseRequest:
    return LeaseRequest(0, session, 1, "0", 10, 1, 0, False)


def test_a_lease_of_a_server_that_failed_is_refused_with_the_reason(servers: list[Server]) -> None:
    server = build(workers=1, total=100, rule=Broken())
    servers.append(server)
    exchange = LocalExchange(server)
    worker = Worker(0, Binding(server.layout, torch.nn.Linear(4, 3)), exchange)
    worker.join()
    worker.count_step()
    with pytest.raises(RuntimeError, match="the rule broke"):
        worker.end_round()
    exchange.request_lease(ask(worker.session))
    assert "the rule broke" in (exchange.take_lease(1).refused or "")


def test_a_lease_that_waits_for_a_closed_server_says_so(servers: list[Server]) -> None:
    server = build(workers=1, total=100)
    exchange = LocalExchange(server)
    server.close()
    exchange.request_lease(ask())
    with pytest.raises(ExchangeError, match="is closed"):
        exchange.take_lease(1)


def test_a_world_of_one_has_its_lease_at_once(servers: list[Server]) -> None:
    server = build(workers=1, total=23, threaded=False)
    servers.append(server)
    exchange = LocalExchange(server)
    worker = Worker(0, Binding(server.layout, torch.nn.Linear(4, 3)), exchange)
    worker.join()
    desk = LeaseDesk(exchange, 0, worker.session)
    assert desk.stock("0", 10, 1).next(0) == (0, 0)


# ------------------------------------------------------------ coming and going


def push_of(worker: int, sequence: int, version: int, session: str | None = None) -> Push:
    return Push(worker, session or f"s{worker}", sequence, "this", version, 5, 5, 0, 0.0, 0.0, False, False)


def hand_in(server: Server, push: Push, outlet: Recorder, value: float = 1.0) -> None:
    """As the wire does it, with a buffer of the pool; waits for the answer."""
    outlet.told.clear()
    lease = server.buffers.try_acquire()
    assert lease is not None
    lease.tensor.fill_(value)
    server.push(push, lease, outlet)
    assert outlet.told.wait(10)
    for answer in outlet.leases:
        answer.release()
    outlet.leases.clear()


def begin(server: Server, workers: int) -> list[Recorder]:
    outlets = [Recorder() for _ in range(workers)]
    for number, outlet in enumerate(outlets):
        server.join(Hello(PROTOCOL_VERSION, number, f"s{number}", server.layout.fingerprint), outlet)
    for outlet in outlets:
        assert outlet.told.wait(10)
        outlet.leases.pop().release()
    return outlets


def introduction(server: Server, worker: int) -> Facts:
    told: list[Facts] = []
    server.introduce(worker, told.append)
    server.ask(lambda coordinator: None)
    return told[0]


def test_whoever_comes_later_is_told_what_it_needs(servers: list[Server]) -> None:
    server = build(workers=2, total=10)
    servers.append(server)
    server.about = About(workers=2, seed=7, fit=3, folder="run", unshared="hash", epoch=4, ahead=5)
    expected = Facts("this", "", 2, 2, 7, 3, "run", "hash", 4, 5, None)
    assert introduction(server, -1) == expected
    assert introduction(server, -1).worker == 3
    assert introduction(server, 1).worker == 1
    assert introduction(server, 1).refused is None
    assert "no worker 4" in (introduction(server, 4).refused or "")
    assert "no worker -2" in (introduction(server, -2).refused or "")
    outlets = begin(server, 2)
    for worker in (0, 1):
        server.push(push_of(worker, 1, 0), filled(server), outlets[worker])
    server.ask(lambda coordinator: None)
    assert outlets[0].replies[-1].stop
    for worker in (-1, 1):
        assert "training is over" in (introduction(server, worker).refused or "")


def filled(server: Server) -> BufferLease:
    lease = None
    while lease is None:
        lease = server.buffers.try_acquire()
    lease.tensor.fill_(1.0)
    return lease


def test_of_a_server_that_failed_nobody_is_told_anything_else(servers: list[Server]) -> None:
    server = build(workers=1, total=100, rule=Broken())
    servers.append(server)
    worker = Worker(0, Binding(server.layout, torch.nn.Linear(4, 3)), LocalExchange(server))
    worker.join()
    worker.count_step()
    with pytest.raises(RuntimeError, match="the rule broke"):
        worker.end_round()
    told: list[Facts] = []
    done = threading.Event()
    server.revive(0, worker.session)
    server.introduce(-1, lambda facts: (told.append(facts), done.set())[0])
    assert done.wait(10)
    assert "the rule broke" in (told[0].refused or "")


def test_a_worker_that_was_lost_is_told_nothing_and_goes_on_when_it_is_back(servers: list[Server]) -> None:
    server = build(workers=2, total=None)
    servers.append(server)
    outlets = begin(server, 2)
    server.lost(1, "s1", "it was silent")
    assert server.ask(lambda coordinator: coordinator.live) == [0]
    server.revive(1, "s1")
    assert server.ask(lambda coordinator: coordinator.live) == [0, 1]
    assert outlets[1].refusals == []
    # It has no connection yet, so that an answer which is due now goes nowhere.
    again = Recorder()
    server.join(Hello(PROTOCOL_VERSION, 1, "s1", server.layout.fingerprint, rejoining=True), again)
    hand_in(server, push_of(1, 1, 0), again)
    assert again.replies[-1].refused is None
    server.lost(1, "s1", "its connection ended")
    server.revive(1, "s1")
    hand_in(server, push_of(1, 2, 1), again)
    assert again.replies[-1].refused is None
    server.revive(1, "another")
    server.revive(7, "s7")
    assert server.ask(lambda coordinator: coordinator.live) == [0, 1]


def test_a_worker_in_quarantine_is_told_so_and_can_be_read(servers: list[Server]) -> None:
    server = build(workers=2, total=None)
    servers.append(server)
    outlets = begin(server, 2)
    assert server.quarantined == frozenset()
    for sequence in range(1, 6):
        version = outlets[1].replies[-1].version
        hand_in(server, push_of(1, sequence, version), outlets[1], float("nan"))
    assert "quarantined" in outlets[1].refusals[0]
    server.ask(lambda coordinator: None)
    assert server.quarantined == {1}
    assert server.view.refusals == {"not_finite": 5}
    assert "quarantined" in (introduction(server, 1).refused or "")
    newer = Recorder()
    server.join(Hello(PROTOCOL_VERSION, 1, "newer", server.layout.fingerprint), newer)
    assert newer.told.wait(10)
    assert newer.refusals == outlets[1].refusals
    hand_in(server, push_of(0, 1, 0), outlets[0])
    assert outlets[0].replies[-1].refused is None


def test_what_was_settled_before_anybody_asked_is_told_first(servers: list[Server]) -> None:
    server = build(workers=1, total=None)
    servers.append(server)
    (outlet,) = begin(server, 1)
    told: list[Settled] = []
    for sequence in range(1, 6):
        if sequence == 3:
            server.record(told.append)
        if sequence == 5:
            server.record(None)
        hand_in(server, push_of(0, sequence, sequence - 1), outlet)
    server.ask(lambda coordinator: None)
    assert [settled.sequence for settled in told] == [1, 2, 3, 4]
    assert [settled.version for settled in told] == [1, 2, 3, 4]


def test_metrics_that_nobody_reads_have_their_bound(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_async_localsgd.server._MOST_METRICS", 2)
    server = build(workers=1, total=None)
    servers.append(server)
    (outlet,) = begin(server, 1)
    for sequence in range(1, 5):
        hand_in(server, dataclasses.replace(push_of(0, sequence, sequence - 1), metrics="{}"), outlet)
    assert server.received_metrics.qsize() == 2
    assert "left out" in caplog.text


def test_the_names_of_inner_states_can_be_read(servers: list[Server]) -> None:
    server = build(workers=1, total=None)
    servers.append(server)
    (outlet,) = begin(server, 1)
    hand_in(server, dataclasses.replace(push_of(0, 1, 0), inner="worker-0.pt"), outlet)
    assert server.inner_states == {0: "worker-0.pt"}
    assert server.state_dict()["inner_states"] == {"0": "worker-0.pt"}
