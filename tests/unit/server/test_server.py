"""The owner thread with real workers in other threads of one process."""

from __future__ import annotations

import threading
import time
from typing import Literal

import pytest
import torch

from lightning_async_localsgd.outer import DelayedNesterov, Nesterov
from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.layout import Binding
from lightning_async_localsgd.protocol.lease_source import wait_for_lease
from lightning_async_localsgd.protocol.messages import JoinInfo, LeaseRequest, Push
from lightning_async_localsgd.runtime.leases import LeaseClient
from lightning_async_localsgd.runtime.local_exchange import LocalExchange
from lightning_async_localsgd.runtime.optimizer_weights import OptimizerWeights
from lightning_async_localsgd.runtime.worker import Worker
from lightning_async_localsgd.server.server import Server
from tests.harness import hello
from tests.lightning_models import ScheduleFree
from tests.unit.server.serving import BrokenOptimizer, RecordingChannel, filled, join_all, make_server, push_of


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
    server = make_server(workers=3, total=300)
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
    assert server.copy_model(model) == server.snapshot.version == sum(t.rounds for t in totals.values())
    assert torch.equal(server.layout.views(model)["weight"], first["weight"])


def test_quorum_of_all_merges_whole_rounds(servers: list[Server]) -> None:
    server = make_server(workers=3, total=300, outer_optimizer=Nesterov(lr=0.7), quorum="all")
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
    assert server._traffic.uploads.in_use == 0


def test_single_worker_needs_no_thread(servers: list[Server]) -> None:
    server = make_server(workers=1, total=23, threaded=False)
    servers.append(server)
    module = torch.nn.Linear(4, 3)
    worker = Worker(0, Binding(server.layout, module), LocalExchange(server))
    before = set(threading.enumerate())
    train(worker, module, 0.0)
    assert set(threading.enumerate()) == before
    assert worker.total_steps == 23
    assert server.snapshot.version == 5


def test_failure_of_the_owner_thread_reaches_all_waiting_workers(servers: list[Server]) -> None:
    server = make_server(workers=1, total=100, outer_optimizer=BrokenOptimizer())
    servers.append(server)
    module = torch.nn.Linear(4, 3)
    worker = Worker(0, Binding(server.layout, module), LocalExchange(server))
    worker.join()
    worker.count_step()
    with pytest.raises(RuntimeError, match="the outer optimizer broke"):
        worker.end_round()
    with pytest.raises(RuntimeError, match="the outer optimizer broke"):
        server.raise_failure()
    late = RecordingChannel()
    server.join(hello(1, "late", server.layout), late)
    assert late.answered.wait(10)
    assert "the outer optimizer broke" in late.refusals[0]
    # The outer step was interrupted, so its model must not be used.
    with pytest.raises(RuntimeError, match="the outer optimizer broke"):
        server.state_dict()
    with pytest.raises(RuntimeError, match="the outer optimizer broke"):
        server.copy_model(torch.empty(server.layout.numel))
    assert server.totals()[0].rounds == 0
    # What fails after that is not the reason.
    server.request_lease(ask(), lambda lease: 1 / 0)
    assert server.live
    with pytest.raises(RuntimeError, match="the outer optimizer broke"):
        server.raise_failure()


def test_single_worker_has_no_state_after_a_failure(servers: list[Server]) -> None:
    server = make_server(workers=1, total=100, threaded=False, outer_optimizer=BrokenOptimizer())
    servers.append(server)
    worker = Worker(0, Binding(server.layout, torch.nn.Linear(4, 3)), LocalExchange(server))
    worker.join()
    assert server.state_dict()["model"]["version"] == 0
    worker.count_step()
    with pytest.raises(RuntimeError, match="the outer optimizer broke"):
        worker.end_round()
    with pytest.raises(RuntimeError, match="the outer optimizer broke"):
        server.state_dict()


def test_final_model_still_reaches_its_worker_when_the_server_is_closed() -> None:
    server = make_server(workers=2, total=10)
    channels = join_all(server, 2)
    for number, channel in enumerate(channels):
        channel.answered.clear()
        server.push(push_of(number, 1, 0), filled(server), channel)
    assert all(channel.answered.wait(10) for channel in channels)
    assert server.finished
    server.close()
    for channel in channels:
        assert channel.replies[-1].stop
        assert channel.refusals == []
        channel.leases.pop().release()


def test_closed_server_refuses_waiting_workers_and_releases_its_buffers(servers: list[Server]) -> None:
    server = make_server(workers=2, total=100)
    channel = RecordingChannel()
    server.join(hello(0, "s", server.layout), channel)
    assert server.missing == [1]
    lease = server._traffic.uploads.try_acquire()
    push = Push(0, "s", 1, "this", 0, 1, 1, 0, 0.0, 0.0, False, False)
    server.push(push, lease, channel)
    server.close("the end of the test")
    assert channel.refusals == ["the end of the test"]
    assert server._traffic.uploads.in_use == 0
    with pytest.raises(RuntimeError, match="closed"):
        assert server.live


# ---------------------------------------------------------------- data leases


@pytest.mark.parametrize("quorum", [1, 2, "all"])
def test_workers_of_unequal_speed_share_each_epoch(servers: list[Server], quorum: int | Literal["all"]) -> None:
    server = make_server(
        workers=3, total=None, outer_optimizer=DelayedNesterov() if quorum == 1 else Nesterov(lr=0.7), quorum=quorum
    )
    servers.append(server)
    seen: list[list[tuple[int, int]]] = [[], [], []]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            worker = Worker(number, Binding(server.layout, torch.nn.Linear(4, 3)), LocalExchange(server))
            leases = LeaseClient(worker.exchange, number, worker.session)
            worker.items_used = leases.items_used
            stock = leases.buffer("0", 100, 1)
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


def test_failed_server_refuses_leases_with_the_reason(servers: list[Server]) -> None:
    server = make_server(workers=1, total=100, outer_optimizer=BrokenOptimizer())
    servers.append(server)
    exchange = LocalExchange(server)
    worker = Worker(0, Binding(server.layout, torch.nn.Linear(4, 3)), exchange)
    worker.join()
    worker.count_step()
    with pytest.raises(RuntimeError, match="the outer optimizer broke"):
        worker.end_round()
    answer = exchange.request_lease(ask(worker.session))
    assert "the outer optimizer broke" in (wait_for_lease(exchange, answer).refused or "")


def test_waiting_for_a_lease_of_a_closed_server_raises(servers: list[Server]) -> None:
    server = make_server(workers=1, total=100)
    exchange = LocalExchange(server)
    server.close()
    answer = exchange.request_lease(ask())
    with pytest.raises(ExchangeError, match="is closed"):
        wait_for_lease(exchange, answer)


def test_single_worker_gets_its_lease_at_once(servers: list[Server]) -> None:
    server = make_server(workers=1, total=23, threaded=False)
    servers.append(server)
    exchange = LocalExchange(server)
    worker = Worker(0, Binding(server.layout, torch.nn.Linear(4, 3)), exchange)
    worker.join()
    leases = LeaseClient(exchange, 0, worker.session)
    assert leases.buffer("0", 10, 1).next(0) == (0, 0)


def test_failed_server_answers_join_requests_with_the_reason(servers: list[Server]) -> None:
    server = make_server(workers=1, total=100, outer_optimizer=BrokenOptimizer())
    servers.append(server)
    worker = Worker(0, Binding(server.layout, torch.nn.Linear(4, 3)), LocalExchange(server))
    worker.join()
    worker.count_step()
    with pytest.raises(RuntimeError, match="the outer optimizer broke"):
        worker.end_round()
    infos: list[JoinInfo] = []
    done = threading.Event()
    server.revive(0, worker.session)
    server.request_join_info(-1, lambda info: (infos.append(info), done.set())[0])
    assert done.wait(10)
    assert "the outer optimizer broke" in (infos[0].refused or "")


def test_optimizer_of_a_worker_that_loses_the_server_remembers_weights_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*_: object) -> None:
        assert not optimizer.param_groups[0]["train_mode"], "the shown weights are pushed"
        raise ExchangeError("the server is gone")

    server = make_server(workers=1, total=None, threaded=False)
    module = torch.nn.Linear(4, 3)
    optimizer = ScheduleFree(module.parameters(), lr=0.1)
    optimizer.train()
    worker = Worker(0, Binding(server.layout, module), LocalExchange(server))
    worker.optimizer_weights = OptimizerWeights([optimizer])
    worker.join()
    for _ in range(2):
        module(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        worker.count_step()
    before = module.weight.detach().clone(), optimizer.state[module.weight]["z"].clone()
    monkeypatch.setattr(worker.exchange, "push", lost)
    with pytest.raises(ExchangeError, match="the server is gone"):
        worker.end_round()
    torch.testing.assert_close((module.weight.detach(), optimizer.state[module.weight]["z"]), before)
    assert optimizer.param_groups[0]["train_mode"]
