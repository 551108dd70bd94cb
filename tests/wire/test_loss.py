"""Killed and frozen processes, broken connections, stalled peers: what is noticed, and what is left behind."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import zmq

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.lease_source import wait_for_lease
from lightning_async_localsgd.protocol.messages import Push
from lightning_async_localsgd.wire import Endpoints, WireServer, frames
from tests.proxy import Proxy
from tests.wire import programs
from tests.wire.fakes import PATIENCE, FakeServer, WireHarness, hello, lease_request, listening, push, wait_for
from tests.wire.programs import Start

OpenWire = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
FRAME = frames.FRAME_BYTES // 4


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Return a function that lists files, socket files and shared memory of this project."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def leftovers() -> list[Path]:
        shared = [path for path in Path("/dev/shm").iterdir() if "async_localsgd" in path.name]
        # The pipe of multiprocessing is in a folder of its own.
        return shared + [path for path in tmp_path.iterdir() if not path.name.startswith("pymp-")]

    return leftovers


# ------------------------------------------------------------------- processes


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_worker_killed_during_a_round_is_noticed_at_once(
    wire: WireHarness, start: Start, kind: str, files: Callable[[], list[Path]]
) -> None:
    # The silence timeout is much longer than this test waits.
    fake, server = wire.server(FRAME, ipc=kind == "ipc", tcp=kind == "tcp", silence_timeout=10 * PATIENCE)
    endpoints = server.local_endpoints or server.endpoints
    victims = [start(programs.worker, endpoints, FRAME, number, 600.0) for number in (1, 2)]
    assert [victim.receive() for victim in victims] == ["joined", "joined"]
    assert victims[0].request("push") == "pushing 1"
    assert victims[0].receive() == "pushed 1 1 None"
    victims[0].kill()
    wait_for(lambda: fake.lost_sessions, "the loss is noticed")
    assert fake.lost_sessions == [(1, "life-1", "its connection ended")]
    assert victims[1].request("push") == "pushing 1"
    assert victims[1].receive() == "pushed 1 2 None"
    victims[1].pipe.send("end")
    wait_for(lambda: len(fake.lost_sessions) == 2, "the goodbye arrives")
    assert fake.lost_sessions[1] == (2, "life-2", "it said goodbye")
    assert not files()


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
@pytest.mark.parametrize("moment", ["upload", "wait", "download"])
def test_worker_killed_during_an_exchange_leaves_nothing_behind(
    wire: WireHarness, start: Start, kind: str, moment: str
) -> None:
    # Larger than the system's buffers, so that a stopped worker is in the middle of its transfer.
    numel = 60 * FRAME
    fake, server = wire.server(numel, ipc=kind == "ipc", tcp=kind == "tcp", silence_timeout=10 * PATIENCE)
    endpoints = server.local_endpoints or server.endpoints
    victim = start(programs.worker, endpoints, numel, 1, 600.0)
    assert victim.receive() == "joined"
    received, sent = server.bytes_received, server.bytes_sent
    fake.answering.clear()
    assert victim.request("push") == "pushing 1"
    if moment == "upload":
        wait_for(lambda: server.bytes_received > received + 2 * frames.FRAME_BYTES, "the upload starts")
        os.kill(victim.pid, signal.SIGSTOP)
    else:
        wait_for(lambda: fake.pushed, "the push arrives")
    if moment == "download":
        os.kill(victim.pid, signal.SIGSTOP)
        fake.answering.set()
        wait_for(lambda: server.bytes_sent > sent + 2 * frames.FRAME_BYTES, "the download starts")
    victim.kill()
    wait_for(lambda: fake.lost_sessions, "the loss is noticed")
    assert fake.lost_sessions == [(1, "life-1", "its connection ended")]
    fake.answering.set()
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout, 2, "life-2"), model)
    exchange.push(push(1, 2, "life-2"), torch.ones(numel), model)
    assert torch.equal(model, fake.model)


@pytest.mark.parametrize("endpoint_index", [0, 1], ids=["ipc", "tcp"])
@pytest.mark.parametrize("moment", ["round", "wait", "lease"])
def test_worker_of_a_killed_server_ends_and_leaves_nothing_behind(
    wire: WireHarness, start: Start, endpoint_index: int, moment: str, files: Callable[[], list[Path]]
) -> None:
    host = start(programs.server, FRAME)
    endpoints = host.receive()[endpoint_index]
    client = FakeServer(FRAME)
    exchange = wire.worker(endpoints, client, silence_timeout=600.0)
    model = torch.zeros(FRAME)
    exchange.join(hello(client.layout), model)
    client.close()
    if moment == "round":
        host.kill()
        with pytest.raises(ExchangeError, match=f"the server at {endpoints.address} is gone"):
            wait_for(lambda: exchange.check(), "the end is noticed")
    elif moment == "lease":
        assert host.request("hold") == "holding"
        answer = exchange.request_lease(lease_request(1))
        host.kill()
        with pytest.raises(ExchangeError, match=f"the server at {endpoints.address} is gone"):
            wait_for_lease(exchange, answer)
    else:
        assert host.request("hold") == "holding"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(exchange.push, push(1), torch.ones(FRAME), model)
            time.sleep(0.1)
            host.kill()
            with pytest.raises(ExchangeError, match=f"the server at {endpoints.address} is gone"):
                waiting.result(PATIENCE)
    exchange.close()
    assert not files()
    assert endpoints.address.removeprefix("ipc://") not in listening()


def test_frozen_worker_is_lost_and_learns_it(wire: WireHarness, start: Start) -> None:
    fake, server = wire.server(FRAME, silence_timeout=0.5)
    frozen = start(programs.worker, server.local_endpoints, FRAME, 1, 30.0)
    assert frozen.receive() == "joined"
    os.kill(frozen.pid, signal.SIGSTOP)
    wait_for(lambda: fake.lost_sessions, "the silence is noticed")
    worker, session, reason = fake.lost_sessions[0]
    assert (worker, session) == (1, "life-1")
    assert "silent for" in reason or "connection ended" in reason
    fake.refusal = "the session was lost"
    os.kill(frozen.pid, signal.SIGCONT)
    frozen.pipe.send("push")
    reports = [frozen.receive(), frozen.receive()]
    assert reports == ["pushing 1", "error the session was lost"]
    assert len(fake.lost_sessions) == 1


# --------------------------------------------------------------------- silence


def test_worker_without_heartbeat_is_lost(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire(silence_timeout=0.5)
    other = wire.worker(endpoints, fake, silence_timeout=0.5)
    other.join(hello(fake.layout, 2, "life-2"), torch.zeros(1000))
    silent = wire.raw(endpoints)
    silent.say_hello(fake.layout)
    wait_for(lambda: fake.lost_sessions, "the silence is noticed")
    assert fake.lost_sessions[0][:2] == (1, "life-1")
    assert "silent for" in fake.lost_sessions[0][2]
    wait_for(lambda: fake.buffers.in_use == 0, "the download is cancelled")


@pytest.mark.parametrize("moment", ["upload", "download"])
def test_peer_with_a_stalled_transfer_delays_no_worker_and_is_lost(
    open_wire: OpenWire, wire: WireHarness, moment: str
) -> None:
    numel = 40 * FRAME
    fake, server, endpoints = open_wire(numel, silence_timeout=4.0)
    stalled = wire.raw(endpoints)
    stalled.say_hello(fake.layout)
    if moment == "upload":
        stalled.send(frames.PUSH + push(1).encode())
        stalled.receive(frames.GO)
        stalled.send(frames.pack_part(frames.DATA, 1, 0), bytes(frames.FRAME_BYTES))
    else:
        stalled.receive(frames.MODEL)
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout, 2, "life-2"), model)
    for sequence in (1, 2):
        exchange.push(push(sequence, 2, "life-2"), torch.ones(numel), model)
    assert not fake.lost_sessions, "the other worker did not wait for the loss"
    ping = frames.Ping(1, "life-1", "00").encode()
    deadline = time.monotonic() + PATIENCE
    while not fake.lost_sessions:
        # Its pings arrive, but its transfer does not move.
        stalled.send(frames.PING + ping)
        time.sleep(0.05)
        assert time.monotonic() < deadline
    assert fake.lost_sessions[0][:2] == (1, "life-1")
    assert f"its {moment} stalled" in fake.lost_sessions[0][2]
    if moment == "upload":
        wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    stalled.close()
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    exchange.push(push(3, 2, "life-2"), torch.ones(numel), model)
    assert torch.equal(model, fake.model)
    assert server.rejected_messages == 0


def test_stalled_uploads_never_exceed_the_pool(wire: WireHarness) -> None:
    numel = 2 * FRAME
    fake, server = wire.server(numel, max_total=4)
    peers = []
    for number in range(1, 7):
        peer = wire.raw(server.local_endpoints)
        peer.say_hello(fake.layout, number, f"life-{number}")
        peer.receive(frames.MODEL)
        peer.receive(frames.MODEL)
        peer.send(frames.pack_part(frames.CREDIT, 1, 2))
        peers.append(peer)
    wait_for(lambda: fake.buffers.in_use == 0, "all models have arrived")
    for number, peer in enumerate(peers, start=1):
        peer.send(frames.PUSH + push(1, number, f"life-{number}").encode())
        if number <= 4:
            peer.receive(frames.GO)
    assert fake.buffers.in_use == 4
    assert not peers[4].socket.poll(300)
    peers[0].close()
    peers[4].receive(frames.GO)
    assert fake.buffers.in_use == 4


# ----------------------------------------------------------- broken connections


ProxiedWire = tuple[FakeServer, WireServer, Proxy, Endpoints]
"""A server, the proxy in front of it, and the endpoints of the proxy."""


@pytest.fixture(params=[False, True], ids=["plain", "curve"])
def proxied(request: pytest.FixtureRequest, wire: WireHarness) -> ProxiedWire:
    fake, server = wire.server(30 * FRAME, ipc=False, tcp=True, encrypt=request.param)
    return fake, server, *wire.proxy(server.endpoints)


def test_push_continues_over_a_new_connection_and_counts_once(proxied: ProxiedWire, wire: WireHarness) -> None:
    fake, server, proxy, endpoints = proxied
    numel = fake.layout.numel
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout), model)
    # During an upload.
    proxy.break_after(5 * frames.FRAME_BYTES)
    reply = exchange.push(push(1), torch.ones(numel), model)
    assert (reply.sequence, reply.version, reply.refused) == (1, 1, None)
    # Between exchanges.
    proxy.break_()
    wait_for(lambda: fake.lost_sessions, "the loss is noticed")
    exchange.check()
    reply = exchange.push(push(2), torch.ones(numel), model)
    assert (reply.sequence, reply.version, reply.refused) == (2, 2, None)
    assert torch.equal(model, fake.model)
    assert [header.reconnecting for header in fake.joined] == [False, True, True]
    assert {header.session for header in fake.joined} == {"life-1"}
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    assert server.rejected_messages == 0


def test_push_with_a_lost_answer_is_sent_again_with_its_number(proxied: ProxiedWire, wire: WireHarness) -> None:
    fake, _, proxy, endpoints = proxied
    numel = fake.layout.numel
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout), model)
    fake.answering.clear()
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(exchange.push, push(1), torch.ones(numel), model)
        wait_for(lambda: fake.pushed, "the push arrives")
        proxy.break_()
        wait_for(lambda: len(fake.joined) == 2, "the worker reconnects")
        fake.answering.set()
        reply = pushing.result(PATIENCE)
    sent: list[Push] = [header for header, _ in fake.pushed]
    assert sent == [sent[0], sent[0]]
    assert (reply.version, reply.refused) == (1, "already applied")
    assert torch.equal(model, fake.model)
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")


def test_lost_lease_is_requested_again_with_its_number(proxied: ProxiedWire, wire: WireHarness) -> None:
    fake, server, proxy, endpoints = proxied
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(fake.layout.numel))
    fake.answering.clear()
    answers = [exchange.request_lease(lease_request(1))]
    wait_for(lambda: fake.lease_requests, "the request arrives")
    for breaks in (1, 2):
        proxy.break_()
        wait_for(lambda breaks=breaks: len(fake.lease_requests) > breaks, "the request is sent again")
    answers.append(exchange.request_lease(lease_request(2)))
    fake.answering.set()
    assert [answer.result(PATIENCE).start for answer in answers] == [1, 2]
    assert fake.lease_requests == [lease_request(1), lease_request(1), lease_request(1), lease_request(2)]
    # While the worker is not connected.
    proxy.break_()
    assert exchange.request_lease(lease_request(3)).result(PATIENCE).start == 3
    assert server.rejected_messages == 0


def test_worker_whose_first_download_breaks_joins_again(proxied: ProxiedWire, wire: WireHarness) -> None:
    fake, server, proxy, endpoints = proxied
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(fake.layout.numel)
    with ThreadPoolExecutor(1) as pool:
        fake.answering.clear()
        joining = pool.submit(exchange.join, hello(fake.layout), model)
        wait_for(lambda: fake.joined, "the hello arrives")
        proxy.break_()
        fake.answering.set()
        assert joining.result(PATIENCE).version == 0
    assert torch.equal(model, fake.model)
    assert [header.reconnecting for header in fake.joined] == [False, False]
    assert server.rejected_messages == 0


def test_silent_server_is_gone_after_the_timeout(proxied: ProxiedWire, wire: WireHarness) -> None:
    fake, _, proxy, endpoints = proxied
    exchange = wire.worker(endpoints, fake, silence_timeout=1.0)
    model = torch.zeros(fake.layout.numel)
    exchange.join(hello(fake.layout), model)
    proxy.freeze()
    with pytest.raises(
        ExchangeError, match=r"has been silent for \d+ s; .* raise exchange.silence_timeout|is gone: .*, for [\d.]+ s"
    ):
        exchange.push(push(1), torch.ones(len(model)), model)
    with pytest.raises(ExchangeError, match="has been silent for"):
        wait_for(exchange.check, "the silence is noticed")


def test_session_that_reconnects_repeatedly_holds_no_buffers(open_wire: OpenWire, wire: WireHarness) -> None:
    # Larger than the system's buffers. The models are not read, and no connection ends.
    fake, _, endpoints = open_wire(60 * FRAME)
    connections = []
    for _ in range(6):
        connections.append(wire.raw(endpoints))
        connections[-1].say_hello(fake.layout)
        connections[-1].receive(frames.REPLY)
    wait_for(lambda: fake.buffers.in_use <= 1, "the downloads over older connections are cancelled")
    assert not fake.lost_sessions, "the session was never lost"


def test_newer_connection_of_a_session_replaces_the_older_one(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire(FRAME)
    older, newer = wire.raw(endpoints), wire.raw(endpoints)
    older.say_hello(fake.layout)
    older.send(frames.PUSH + push(1).encode())
    older.receive(frames.GO)
    newer.say_hello(fake.layout)
    wait_for(lambda: fake.buffers.in_use <= 1, "the buffer of the older upload is free")
    wait_for(lambda: not older.socket.poll(0, zmq.POLLOUT), "the server closes the older connection")
    newer.send(frames.PUSH + push(1).encode())
    newer.receive(frames.GO)
    newer.send(frames.pack_part(frames.DATA, 1, 0), bytes(frames.FRAME_BYTES))
    wait_for(lambda: len(fake.pushed) == 1, "the push arrives")
    assert not fake.lost_sessions, "the session was never lost"
    assert server.rejected_messages == 0
