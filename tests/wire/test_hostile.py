"""Peers without the token and broken workers are refused and counted, and the run continues."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import zmq

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import Lease
from lightning_async_localsgd.wire import Endpoints, WireExchange, WireServer, frames
from lightning_async_localsgd.wire.heartbeat import Heartbeat
from tests.wire.fakes import PATIENCE, FakeServer, WireHarness, hello, layout_of, lease_request, push, wait_for

OpenWire = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
NUMEL = frames.FRAME_BYTES // 2

ZMTP3 = b"\xff" + bytes(8) + b"\x7f\x03\x00"
"""The first bytes of every ZMTP 3 connection."""


def dial(endpoints: Endpoints) -> socket.socket:
    """Open a plain socket to the server's port."""
    if endpoints.address.startswith("ipc://@"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect("\0" + endpoints.address.removeprefix("ipc://@"))
    else:
        host, _, port = endpoints.address.removeprefix("tcp://").rpartition(":")
        connection = socket.create_connection((host, int(port)))
    connection.settimeout(30)
    return connection


class Bystander:
    """A valid worker, which must not be affected by the tests' peers."""

    def __init__(self, wire: WireHarness, fake: FakeServer, endpoints: Endpoints) -> None:
        self._exchange = wire.worker(endpoints, fake)
        self._model = torch.zeros(fake.layout.numel)
        self._sequence = 0
        self._fake = fake
        self._exchange.join(hello(fake.layout, 9, "life-9"), self._model)

    def works(self) -> bool:
        self._sequence += 1
        reply = self._exchange.push(push(self._sequence, 9, "life-9"), torch.ones(len(self._model)), self._model)
        self._exchange.check()
        return reply.refused is None and bool(torch.equal(self._model, self._fake.model))


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        os.urandom(10_000),
        b"\x01\x00\x05\x00abcd",  # ZMTP 1.0
        ZMTP3 + b"NULL".ljust(20, b"\0") + bytes(32),  # No authentication.
        ZMTP3 + b"PLAIN".ljust(20, b"\0") + bytes(32) + b"\x04\x10\x05HELLO\x02me\x06secret",
        ZMTP3 + b"CURVE".ljust(20, b"\0") + bytes(32) + b"\x04\xc8\x05HELLO" + os.urandom(194),
        # A frame of 2**62 bytes.
        ZMTP3 + b"PLAIN".ljust(20, b"\0") + bytes(32) + b"\x02" + b"\x40" + bytes(7) + os.urandom(2**20),
    ],
    ids=["http", "random", "zmtp1", "null", "plain", "curve", "oversized"],
)
def test_garbage_is_dropped_and_counted(
    open_wire: OpenWire, wire: WireHarness, garbage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A peer with wrong credentials is dropped after this time at the latest.
    monkeypatch.setattr("lightning_async_localsgd.wire.listener._HANDSHAKE_MS", 500)
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    assert bystander.works()
    with dial(endpoints) as connection:
        try:
            connection.sendall(garbage)
            while connection.recv(65536):
                pass
        except ConnectionError:
            pass  # Dropped while it was still sending.
    wait_for(lambda: server.rejected_connections == 1, "the connection is counted")
    assert bystander.works()
    assert not fake.lost_sessions
    assert server.rejected_messages == 0


@pytest.mark.parametrize("length", [0, 1, 10, 64, 70])
def test_connection_that_ends_in_the_handshake_is_counted(open_wire: OpenWire, wire: WireHarness, length: int) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    with dial(endpoints) as connection:
        connection.sendall((ZMTP3 + b"PLAIN" + bytes(47) + b"\x04\x30\x05HELLO")[:length])
    wait_for(lambda: server.rejected_connections == 1, "the connection is counted")
    assert bystander.works()


def test_silent_connection_is_dropped(wire: WireHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async_localsgd.wire.listener._HANDSHAKE_MS", 200)
    _, server = wire.server()
    assert server.local_endpoints is not None
    with dial(server.local_endpoints) as connection:
        assert connection.recv(65536), "the server's own greeting"
        while connection.recv(65536):
            pass
    wait_for(lambda: server.rejected_connections == 1, "the connection is counted")


def test_many_refusals_are_logged_in_one_line(wire: WireHarness, caplog: pytest.LogCaptureFixture) -> None:
    _, server = wire.server()
    assert server.local_endpoints is not None
    with caplog.at_level(logging.WARNING, "lightning_async_localsgd"):
        for _ in range(20):
            with dial(server.local_endpoints) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        wait_for(lambda: server.rejected_connections == 20, "all connections are counted")
    lines = [record.message for record in caplog.records if "connections refused" in record.message]
    assert len(lines) == 1
    assert server.local_endpoints.address in lines[0]


def test_worker_with_a_wrong_token_is_refused(wire: WireHarness) -> None:
    for tcp in (False, True):
        fake, server = wire.server(NUMEL, ipc=not tcp, tcp=tcp)
        endpoints = server.endpoints if tcp else server.local_endpoints
        assert endpoints is not None
        bystander = Bystander(wire, fake, endpoints)
        exchange = wire.worker(replace(endpoints, token="guessed"), fake)
        with pytest.raises(ExchangeError, match=f"{endpoints.address} does not accept this worker's token"):
            exchange.join(hello(fake.layout), torch.zeros(NUMEL))
        wait_for(lambda server=server: server.rejected_connections == 1, "the connection is counted")
        assert len(fake.joined) == 1
        assert bystander.works()


def curve_endpoints(server: WireServer, **changes: str | None) -> Endpoints:
    assert server.endpoints is not None
    assert server.endpoints.encrypted
    return replace(server.endpoints, **changes)


def test_worker_with_wrong_keys_is_refused(wire: WireHarness) -> None:
    fake, server = wire.server(NUMEL, ipc=False, tcp=True, encrypt=True)
    bystander = Bystander(wire, fake, curve_endpoints(server))
    public, secret = (key.decode() for key in zmq.curve_keypair())
    cases = {
        "worker": curve_endpoints(server, public_key=public, secret_key=secret),
        "server": curve_endpoints(server, server_key=public),
        "missing": curve_endpoints(server, server_key=None),
    }
    for count, (owner, endpoints) in enumerate(cases.items(), start=1):
        exchange = wire.worker(endpoints, fake, connect_timeout=0.5)
        with pytest.raises(ExchangeError, match=r"does not accept this worker's token|could not be reached"):
            exchange.join(hello(fake.layout), torch.zeros(NUMEL))
        wait_for(
            lambda count=count: server.rejected_connections >= count,
            f"the connection with a wrong {owner} key is counted",
        )
    assert len(fake.joined) == 1
    assert bystander.works()


def test_impostor_at_the_servers_address_is_detected(wire: WireHarness) -> None:
    # The impostor accepts every worker, and so learns the password. It cannot prove that it knows the token.
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gate, router = context.socket(zmq.REP), context.socket(zmq.ROUTER)
    try:
        gate.bind("inproc://zeromq.zap.01")
        router.setsockopt(zmq.PLAIN_SERVER, 1)
        router.setsockopt(zmq.ZAP_DOMAIN, b"async_localsgd")
        router.setsockopt(zmq.LINGER, 0)
        router.bind("tcp://127.0.0.1:*")
        address = router.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        fake = FakeServer(10)
        exchange = WireExchange(
            Endpoints(address, "start-1", "the-token"), fake.layout, silence_timeout=30.0, connect_timeout=30.0
        )

        def impostor() -> None:
            version, request, *_ = gate.recv_multipart()
            gate.send_multipart([version, request, b"200", b"OK", b"", b""])
            identity, greeting, _ = router.recv_multipart()
            assert b"the-token" not in greeting
            welcome = frames.Welcome("start-1", "0" * 64)
            router.send_multipart([identity, frames.WELCOME + welcome.encode()])

        with ThreadPoolExecutor(1) as pool:
            playing = pool.submit(impostor)
            with pytest.raises(ExchangeError, match="is not this run's server: it does not know the token"):
                exchange.join(hello(fake.layout), torch.zeros(10))
            playing.result()
        exchange.close()
        fake.close()
    finally:
        context.destroy(0)


def test_restarted_server_is_detected(wire: WireHarness) -> None:
    fake, server = wire.server(10, token="shared")
    assert server.local_endpoints is not None
    exchange = wire.worker(replace(server.local_endpoints, incarnation="start-0"), fake)
    with pytest.raises(ExchangeError, match="has been restarted"):
        exchange.join(hello(fake.layout), torch.zeros(10))


NOT_A_TRANSFER = frames.pack_part(frames.DATA, 1, 0)


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"?"],
        [b"?", b"x" * 100, b"y" * 100],
        [frames.PUSH + b"{}"],
        [frames.PUSH + b"\xff\xfe"],
        [frames.PUSH + b"[" * 50_000],
        [frames.PUSH + push(1).encode()],
        [frames.HELLO + b"not json", bytes(16)],
        [frames.HELLO, bytes(16)],
        [frames.HELLO],
        [frames.PING + b"{}"],
        [frames.LEASE_REQUEST + lease_request(1).encode()],
        [frames.LEASE_REQUEST + b"{}"],
        [frames.LEASE + b"{}"],
        [NOT_A_TRANSFER, bytes(100)],
        [frames.CREDIT],
        [frames.BYE],
    ],
    ids=lambda parts: f"{parts[0][:8]!r}x{len(parts)}",
)
def test_invalid_message_from_an_unknown_peer_is_counted(
    open_wire: OpenWire, wire: WireHarness, parts: list[bytes]
) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    peer = wire.raw(endpoints)
    peer.send(*parts)
    peer.receive(frames.UNKNOWN)
    assert server.rejected_messages == 1
    assert bystander.works()
    assert not fake.lost_sessions


BROKEN_MESSAGES: dict[str, list[bytes]] = {
    "empty": [b""],
    "unknown kind": [b"?"],
    "no header": [frames.PUSH + b"{}"],
    "another worker's push": [frames.PUSH + push(1, worker=2).encode()],
    "another session's push": [frames.PUSH + push(1, session="life-2").encode()],
    "data without push": [NOT_A_TRANSFER, bytes(100)],
    "credit for nothing": [frames.pack_part(frames.CREDIT, 7, 1)],
    "short credit": [frames.CREDIT + b"123"],
    "too much credit": [frames.pack_part(frames.CREDIT, 1, 2**60)],
    "hello of another kind": [frames.HELLO + b"{}", bytes(16)],
    "lease request over a bulk connection": [frames.LEASE_REQUEST + lease_request(1).encode()],
    "hello without nonce": [frames.HELLO + hello(layout_of(NUMEL)).encode()],
}


@pytest.mark.parametrize("case", BROKEN_MESSAGES)
def test_invalid_message_from_a_worker_ends_only_its_session(open_wire: OpenWire, wire: WireHarness, case: str) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    worker = wire.raw(endpoints)
    worker.say_hello(fake.layout)
    worker.send(*BROKEN_MESSAGES[case])
    assert b"ended the session of worker 1: it broke the protocol" in worker.receive(frames.REFUSE)[0]
    assert server.rejected_messages == 1
    assert [session[:2] for session in fake.lost_sessions] == [(1, "life-1")]
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    assert bystander.works()


BROKEN_UPLOADS: dict[str, list[bytes]] = {
    "wrong offset": [frames.pack_part(frames.DATA, 1, 4), bytes(frames.FRAME_BYTES)],
    "beyond the end": [frames.pack_part(frames.DATA, 1, 2**60), bytes(frames.FRAME_BYTES)],
    "too short": [frames.pack_part(frames.DATA, 1, 0), bytes(100)],
    "too long": [frames.pack_part(frames.DATA, 1, 0), bytes(frames.FRAME_BYTES + 1)],
    "too many parts": [frames.pack_part(frames.DATA, 1, 0), bytes(frames.FRAME_BYTES), b"more"],
    "no bytes": [frames.pack_part(frames.DATA, 1, 0)],
    "another transfer": [frames.pack_part(frames.DATA, 2, 0), bytes(frames.FRAME_BYTES)],
}


@pytest.mark.parametrize("case", BROKEN_UPLOADS)
def test_broken_upload_never_reaches_the_model(open_wire: OpenWire, wire: WireHarness, case: str) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    worker = wire.raw(endpoints)
    worker.say_hello(fake.layout)
    worker.send(frames.PUSH + push(1).encode())
    worker.receive(frames.GO)
    worker.send(*BROKEN_UPLOADS[case])
    assert b"broke the protocol" in worker.receive(frames.REFUSE)[0]
    assert server.rejected_messages == 1
    assert not fake.pushed
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    # What the worker sends afterwards has no effect either.
    worker.send(frames.pack_part(frames.DATA, 1, 0), bytes(frames.FRAME_BYTES))
    worker.send(frames.PUSH + push(2).encode())
    worker.receive(frames.UNKNOWN)
    assert bystander.works()
    assert [pushed.worker for pushed, _ in fake.pushed] == [9]


def test_oversized_frame_ends_the_connection_before_it_is_received(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    worker = wire.raw(endpoints)
    worker.say_hello(fake.layout)
    worker.send(frames.PUSH + push(1).encode())
    worker.receive(frames.GO)
    worker.send(frames.pack_part(frames.DATA, 1, 0), bytes(frames.MAX_FRAME_BYTES + 1))
    wait_for(lambda: fake.lost_sessions, "the connection is dropped")
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    assert server.bytes_received < frames.FRAME_BYTES
    assert bystander.works()


def test_second_hello_over_one_connection_is_the_same_worker(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire(NUMEL)
    worker = wire.raw(endpoints)
    worker.say_hello(fake.layout)
    worker.say_hello(fake.layout)
    worker.close()
    wait_for(lambda: fake.lost_sessions, "the loss is noticed")
    assert fake.lost_sessions == [(1, "life-1", "its connection ended")]


BROKEN_REQUESTS: dict[str, bytes] = {
    "empty": frames.LEASE_REQUEST,
    "not json": frames.LEASE_REQUEST + b"\xff\xfe",
    "deep": frames.LEASE_REQUEST + b"[" * 50_000,
    "no fields": frames.LEASE_REQUEST + b"{}",
    "huge numbers": frames.LEASE_REQUEST + replace(lease_request(1), items=2**60).encode(),
    "a name that is too long": frames.LEASE_REQUEST + replace(lease_request(1), stream="x" * 20_000).encode(),
    "another worker's": frames.LEASE_REQUEST + lease_request(1, worker=9, session="life-9").encode(),
    "another session's": frames.LEASE_REQUEST + lease_request(1, session="life-2").encode(),
}


@pytest.mark.parametrize("case", BROKEN_REQUESTS)
def test_broken_lease_request_is_counted_and_has_no_effect(open_wire: OpenWire, wire: WireHarness, case: str) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    worker = wire.worker(endpoints, fake)
    worker.join(hello(fake.layout), torch.zeros(NUMEL))
    heartbeat = wire.raw(endpoints)
    heartbeat.send(frames.PING + frames.Ping(1, "life-1", "nonce").encode())
    heartbeat.receive(frames.PONG)
    heartbeat.send(BROKEN_REQUESTS[case])
    heartbeat.receive(frames.UNKNOWN)
    assert server.rejected_messages == 1
    assert not fake.lease_requests
    # Even the worker itself is not affected.
    assert worker.request_lease(lease_request(1)).result(PATIENCE).start == 1
    assert bystander.works()
    assert not fake.lost_sessions


def test_unanswered_lease_requests_are_limited(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    fake.answering.clear()
    heartbeat = wire.raw(endpoints)
    heartbeat.send(frames.PING + frames.Ping(1, "life-1", "nonce").encode())
    for number in range(1, 100):
        heartbeat.send(frames.LEASE_REQUEST + lease_request(number).encode())
    wait_for(lambda: server.rejected_messages == 35, "the excess requests are refused")
    assert len(fake.lease_requests) == 64
    fake.answering.set()
    heartbeat.receive(frames.LEASE)
    assert bystander.works()
    heartbeat.send(frames.LEASE_REQUEST + lease_request(100).encode())
    wait_for(lambda: len(fake.lease_requests) == 65, "another request is accepted")


def test_lease_of_an_impostor_is_ignored() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gate, router = context.socket(zmq.REP), context.socket(zmq.ROUTER)
    try:
        gate.bind("inproc://zeromq.zap.01")
        router.setsockopt(zmq.PLAIN_SERVER, 1)
        router.setsockopt(zmq.ZAP_DOMAIN, b"async_localsgd")
        router.setsockopt(zmq.LINGER, 0)
        router.bind("tcp://127.0.0.1:*")
        endpoints = Endpoints(router.get_string(zmq.LAST_ENDPOINT).rstrip("\0"), "start-1", "the-token")
        heartbeat = Heartbeat(zmq.Context.instance(), endpoints, 1, "life-1", 30.0)
        answer = heartbeat.request_lease(lease_request(1))
        version, request, *_ = gate.recv_multipart()
        gate.send_multipart([version, request, b"200", b"OK", b"", b""])
        identity, ping = router.recv_multipart()
        assert ping[:1] == frames.PING
        assert router.recv_multipart()[1][:1] == frames.LEASE_REQUEST
        router.send_multipart([identity, frames.LEASE + Lease(1, 0, 0, 9, None).encode()])
        router.send_multipart([identity, frames.PONG + frames.Pong("start-1", -1, "0" * 64).encode()])
        wait_for(lambda: heartbeat.failure, "the impostor is detected")
        assert not answer.done()
        heartbeat.close()
    finally:
        context.destroy(0)
