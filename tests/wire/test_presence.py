"""Which sessions count as present when connections break, fall silent and come back."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.server.server import Server
from lightning_async_localsgd.wire import Endpoints, WireServer, frames
from lightning_async_localsgd.wire import presence as presence_module
from lightning_async_localsgd.wire.adaptive_timeout import AdaptiveTimeout
from tests.harness import make_coordinator
from tests.wire import programs
from tests.wire.fakes import PATIENCE, FakeServer, RawWorker, WireHarness, hello, lease_request, push, wait_for
from tests.wire.programs import Start

OpenWire = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
FRAME = frames.FRAME_BYTES // 4


def ping(heartbeat: RawWorker, worker: int = 1, session: str = "life-1") -> None:
    heartbeat.send(frames.PING + frames.Ping(worker, session, "00").encode())
    heartbeat.receive(frames.PONG)


def test_timeout_grows_with_survived_silences() -> None:
    timeout = AdaptiveTimeout(10.0, now=100.0)
    assert not timeout.expired(110.0)
    assert timeout.expired(110.1)
    timeout.record_activity(105.0)
    assert timeout.limit == 15.0
    timeout.record_activity(120.0)
    assert timeout.limit == 45.0
    timeout.record_activity(121.0)
    assert (timeout.limit, timeout.elapsed(125.0)) == (45.0, 4.0)
    timeout.record_activity(5000.0)
    assert timeout.limit == 100.0
    timeout.restart(9000.0)
    assert not timeout.expired(9100.0)
    timeout.record_activity(9001.0)
    assert timeout.limit == 100.0


def test_number_of_lost_sessions_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "MAX_LOST_SESSIONS", 3)
    fake = FakeServer(1)
    presences = presence_module.Presences(fake, 10.0, lambda peer: None)
    stays = presences.on_hello(hello(fake.layout, 0, "stays"), 0.0)
    for number in range(1, 9):
        presences.mark_lost(presences.on_hello(hello(fake.layout, number, f"life-{number}"), 0.0), "killed")
    assert [presence.worker for presence in presences] == [0, 6, 7, 8]
    presences.on_ping("heartbeat", frames.Ping(7, "life-7", "00"), 1.0)
    assert fake.revived == [(7, "life-7")]
    presences.on_ping("heartbeat", frames.Ping(1, "life-1", "00"), 1.0)
    assert fake.revived == [(7, "life-7")]
    assert not stays.lost
    fake.close()


def test_session_is_present_while_one_of_its_connections_is_open(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire(1)
    bulk, heartbeat = wire.raw(endpoints), wire.raw(endpoints)
    bulk.say_hello(fake.layout)
    ping(heartbeat)
    bulk.close()
    again = wire.raw(endpoints)
    again.say_hello(fake.layout)
    ping(heartbeat)
    assert not fake.lost_sessions
    heartbeat.close()
    heartbeat = wire.raw(endpoints)
    ping(heartbeat)
    again.close()
    # A session that requests leases is present, too.
    heartbeat.send(frames.LEASE_REQUEST + lease_request(1).encode())
    heartbeat.receive(frames.LEASE)
    assert not fake.lost_sessions
    heartbeat.close()
    wait_for(lambda: fake.lost_sessions, "the loss is noticed")
    assert fake.lost_sessions == [(1, "life-1", "its connection ended")]
    assert not fake.revived
    assert server.rejected_messages == 0


def test_ping_or_hello_revives_a_lost_session(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire(1)
    bulk = wire.raw(endpoints)
    bulk.say_hello(fake.layout)
    bulk.close()
    wait_for(lambda: fake.lost_sessions, "the loss is noticed")
    heartbeat = wire.raw(endpoints)
    ping(heartbeat)
    ping(heartbeat)
    assert fake.revived == [(1, "life-1")]
    heartbeat.close()
    wait_for(lambda: len(fake.lost_sessions) == 2, "the loss is noticed")
    wire.raw(endpoints).say_hello(fake.layout)
    heartbeat = wire.raw(endpoints)
    ping(heartbeat)
    assert len(fake.revived) == 1
    assert len(fake.joined) == 2
    # A ping of an unknown session revives nothing.
    ping(heartbeat, 2, "life-2")
    assert len(fake.revived) == 1


def test_silent_connection_does_not_hide_the_end_of_a_session(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire(1, silence_timeout=1.0)
    bulk, old, new = (wire.raw(endpoints) for _ in range(3))
    bulk.say_hello(fake.layout)
    bulk.receive(frames.MODEL)
    bulk.send(frames.pack_part(frames.CREDIT, 1, 1))
    ping(old)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        ping(new)
        time.sleep(0.05)
    bulk.close()
    new.close()
    wait_for(lambda: fake.lost_sessions, "the loss is noticed")
    assert fake.lost_sessions == [(1, "life-1", "its connection ended")]
    # A ping over the old connection revives the session. Its pong is sent before the session is revived.
    ping(old)
    wait_for(lambda: fake.revived == [(1, "life-1")], "the session is revived")


@pytest.mark.parametrize("end", ["goodbye", "invalid message", "refused", "superseded"])
def test_ping_does_not_revive_a_session_that_has_ended_for_good(
    open_wire: OpenWire, wire: WireHarness, end: str
) -> None:
    fake, _, endpoints = open_wire(1)
    bulk, heartbeat = wire.raw(endpoints), wire.raw(endpoints)
    bulk.say_hello(fake.layout)
    ping(heartbeat)
    if end == "goodbye":
        bulk.send(frames.BYE)
        wait_for(lambda: fake.lost_sessions, "the session ends")
    elif end == "invalid message":
        bulk.send(b"?")
        bulk.receive(frames.REFUSE)
    elif end == "refused":
        fake.channels[1].refuse("quarantined")
        bulk.receive(frames.REFUSE)
    else:
        heartbeat.close()
        bulk.close()
        wait_for(lambda: fake.lost_sessions, "the session ends")
        wire.raw(endpoints).say_hello(fake.layout, session="life-2")
        heartbeat = wire.raw(endpoints)
    lost = len(fake.lost_sessions)
    ping(heartbeat)
    heartbeat.close()
    another = wire.raw(endpoints)
    ping(another)
    assert not fake.revived
    assert len(fake.lost_sessions) == lost == (0 if end == "refused" else 1)


def test_network_outage_costs_no_push(wire: WireHarness) -> None:
    fake, server = wire.server(30 * FRAME, ipc=False, tcp=True)
    proxy, endpoints = wire.proxy(server.endpoints)
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(fake.layout.numel)
    exchange.join(hello(fake.layout), model)
    # Between two pushes: both connections break, and new ones are refused.
    proxy.cut()
    wait_for(lambda: len(fake.lost_sessions) == 1, "the loss is noticed")
    exchange.check()
    answer = exchange.request_lease(lease_request(1))
    proxy.restore()
    assert answer.result(PATIENCE).start == 1
    wait_for(lambda: fake.revived == [(1, "life-1")], "the session is revived before the next push")
    assert exchange.push(push(1), torch.ones(len(model)), model).refused is None
    # During a push.
    proxy.throttle(20e6)
    with ThreadPoolExecutor(1) as pool:
        received = server.bytes_received
        pushing = pool.submit(exchange.push, push(2), torch.ones(len(model)), model)
        wait_for(lambda: server.bytes_received > received + 5 * frames.FRAME_BYTES, "the upload is halfway")
        proxy.cut()
        wait_for(lambda: len(fake.lost_sessions) == 2, "the loss is noticed")
        wait_for(lambda: fake.buffers.in_use == 0, "the buffer is free")
        proxy.throttle(None)
        proxy.restore()
        assert pushing.result(PATIENCE).refused is None
    assert fake.version == 2
    assert torch.equal(model, fake.model)


def test_frozen_network_is_survived_and_extends_the_timeout(wire: WireHarness) -> None:
    fake, server = wire.server(FRAME, ipc=False, tcp=True, silence_timeout=1.0)
    proxy, endpoints = wire.proxy(server.endpoints)
    exchange = wire.worker(endpoints, fake, silence_timeout=30.0)
    model = torch.zeros(FRAME)
    exchange.join(hello(fake.layout), model)
    proxy.freeze()
    wait_for(lambda: fake.lost_sessions, "the silence is noticed")
    assert "silent for" in fake.lost_sessions[0][2]
    time.sleep(1.0)
    proxy.restore()
    wait_for(lambda: fake.revived, "the session is revived")
    exchange.check()
    # The worker has recovered from two seconds of silence, so the server now waits three times as long.
    proxy.freeze()
    time.sleep(1.5)
    proxy.restore()
    exchange.check()
    reply = exchange.push(push(1), torch.ones(FRAME), model)
    assert (reply.version, reply.refused) == (1, None)
    assert len(fake.lost_sessions) == 1


@pytest.mark.parametrize("moment", ["round", "upload", "download"])
def test_stopped_worker_comes_back_and_its_round_counts_once(wire: WireHarness, start: Start, moment: str) -> None:
    numel = 40 * FRAME
    fake, server = wire.server(numel, silence_timeout=2.0)
    stopped = start(programs.worker, server.local_endpoints, numel, 1, 2.0)
    other = wire.worker(server.local_endpoints, fake)
    model = torch.zeros(numel)
    other.join(hello(fake.layout, 2, "life-2"), model)
    assert stopped.receive() == "joined"
    received, sent = server.bytes_received, server.bytes_sent
    if moment != "round":
        fake.answering.clear()
        assert stopped.request("push") == "pushing 1"
        if moment == "upload":
            wait_for(lambda: server.bytes_received > received + frames.FRAME_BYTES, "the upload starts")
        else:
            wait_for(lambda: fake.pushed, "the push arrives")
    os.kill(stopped.pid, signal.SIGSTOP)
    fake.answering.set()
    if moment == "download":
        wait_for(lambda: server.bytes_sent > sent + frames.FRAME_BYTES, "the download starts")
    wait_for(lambda: fake.lost_sessions, "the silence is noticed")
    assert fake.lost_sessions[0][:2] == (1, "life-1")
    # Other workers go on, with the buffer that the stopped worker held.
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    other.push(push(1, 2, "life-2"), torch.ones(numel), model)
    time.sleep(1.0)
    os.kill(stopped.pid, signal.SIGCONT)
    if moment == "round":
        wait_for(lambda: fake.revived, "the session is revived")
        assert stopped.request("push") == "pushing 1"
    report = stopped.receive().split()
    assert report[:2] == ["pushed", "1"]
    # A push that had arrived before is not applied twice.
    assert report[3:] == (["already", "applied"] if moment == "download" else ["None"])
    assert fake.version == 2
    stopped.pipe.send("end")
    wait_for(lambda: fake.lost_sessions[-1] == (1, "life-1", "it said goodbye"), "the goodbye arrives")


class FaultyNetwork:
    """The real server behind a proxy."""

    def __init__(self, wire: WireHarness, stack: contextlib.ExitStack, numel: int, **options: Any) -> None:
        self.layout = Layout.from_description([["weight", [numel], "torch.float32", "parameter"]])
        self.coordinator = make_coordinator(1, total=None, local_steps=5, layout=self.layout, incarnation="start-1")
        self.model = self.coordinator.model
        server = Server(self.coordinator, BufferPool(numel, max_total=3))
        stack.callback(server.close)
        self.wire = WireServer(server, ipc=False, tcp=True, **{"silence_timeout": 30.0, **options})
        stack.callback(self.wire.close)
        self.proxy, self.endpoints = wire.proxy(self.wire.endpoints)


@pytest.mark.parametrize("fault", ["break", "cut", "freeze"])
def test_real_server_counts_each_round_once_with_a_faulty_network(wire: WireHarness, fault: str) -> None:
    with contextlib.ExitStack() as stack:
        network = FaultyNetwork(wire, stack, 6 * FRAME, silence_timeout=0.5)
        exchange = wire.worker(network.endpoints, network, silence_timeout=30.0)
        model, gradient = torch.zeros(6 * FRAME), torch.ones(6 * FRAME)
        version = exchange.join(hello(network.layout, 0), model).version
        with ThreadPoolExecutor(1) as pool:
            for sequence in range(1, 7):
                # During the upload or, with larger numbers, during the download.
                if fault == "break":
                    network.proxy.break_after(sequence * frames.FRAME_BYTES)
                header = replace(push(sequence, 0), base_version=version)
                pushing = pool.submit(exchange.push, header, gradient, model)
                if fault != "break":
                    time.sleep(0.002 * sequence)
                    getattr(network.proxy, fault)()
                    time.sleep(0.8 if sequence % 3 == 0 else 0.1)
                    network.proxy.restore()
                reply = pushing.result(PATIENCE)
                assert reply.refused in (None, "already applied")
                assert reply.version == sequence
                version = reply.version
        exchange.close()
        assert network.coordinator.totals[0].rounds == 6
        assert torch.equal(model, network.model.theta)
