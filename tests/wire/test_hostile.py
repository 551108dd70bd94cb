"""Whoever does not belong to the run, or has gone wrong, is kept out and counted; the run goes on."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import zmq

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.messages import Lease
from lightning_async_localsgd.wire import Endpoints, WireExchange, WireServer, frames
from lightning_async_localsgd.wire.heart import Heart
from tests.wire.fakes import FakeServer, Wire, ask, hello, layout_of, push, wait_for

Open = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
NUMEL = frames.FRAME_BYTES // 2

ZMTP3 = b"\xff" + bytes(8) + b"\x7f\x03\x00"
"""How every connection of our kind starts."""


def dial(endpoints: Endpoints) -> socket.socket:
    """A plain connection to the server's port."""
    if endpoints.address.startswith("ipc://@"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect("\0" + endpoints.address.removeprefix("ipc://@"))
    else:
        host, _, port = endpoints.address.removeprefix("tcp://").rpartition(":")
        connection = socket.create_connection((host, int(port)))
    connection.settimeout(30)
    return connection


class Bystander:
    """A worker in good order, which must notice nothing."""

    def __init__(self, wire: Wire, fake: FakeServer, endpoints: Endpoints) -> None:
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
        # A frame that claims 2**62 bytes, then keeps sending.
        ZMTP3 + b"PLAIN".ljust(20, b"\0") + bytes(32) + b"\x02" + b"\x40" + bytes(7) + os.urandom(2**20),
    ],
    ids=["http", "random", "zmtp1", "null", "plain", "curve", "oversized"],
)
def test_garbage_is_dropped_and_counted(way: Open, wire: Wire, garbage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    # Somebody with wrong credentials who does not hang up has until then.
    monkeypatch.setattr("lightning_async_localsgd.wire.way._HANDSHAKE_MS", 500)
    fake, server, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    assert bystander.works()
    with dial(endpoints) as connection:
        try:
            connection.sendall(garbage)
            while connection.recv(65536):
                pass
        except ConnectionError:
            pass  # Dropped while it was still talking.
    wait_for(lambda: server.rejected_connections == 1, "the connection is counted")
    assert bystander.works()
    assert not fake.departed
    assert server.rejected_messages == 0


@pytest.mark.parametrize("length", [0, 1, 10, 64, 70])
def test_a_connection_that_breaks_off_is_dropped_and_counted(way: Open, wire: Wire, length: int) -> None:
    fake, server, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    with dial(endpoints) as connection:
        connection.sendall((ZMTP3 + b"PLAIN" + bytes(47) + b"\x04\x30\x05HELLO")[:length])
    wait_for(lambda: server.rejected_connections == 1, "the connection is counted")
    assert bystander.works()


def test_a_connection_that_says_nothing_is_dropped(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async_localsgd.wire.way._HANDSHAKE_MS", 200)
    _, server = wire.server()
    assert server.local_endpoints is not None
    with dial(server.local_endpoints) as connection:
        assert connection.recv(65536), "the server's own greeting"
        while connection.recv(65536):
            pass
    wait_for(lambda: server.rejected_connections == 1, "the connection is counted")


def test_many_refusals_are_one_line_in_the_log(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_wrong_token_is_refused_by_name(wire: Wire) -> None:
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


def test_wrong_keys_are_refused(wire: Wire) -> None:
    fake, server = wire.server(NUMEL, ipc=False, tcp=True, encrypt=True)
    bystander = Bystander(wire, fake, curve_endpoints(server))
    public, secret = (key.decode() for key in zmq.curve_keypair())
    cases = {
        "worker's": curve_endpoints(server, public_key=public, secret_key=secret),
        "server's": curve_endpoints(server, server_key=public),
        "none": curve_endpoints(server, server_key=None),
    }
    for count, (whose, endpoints) in enumerate(cases.items(), start=1):
        exchange = wire.worker(endpoints, fake, connect_timeout=0.5)
        with pytest.raises(ExchangeError, match=r"does not accept this worker's token|could not be reached"):
            exchange.join(hello(fake.layout), torch.zeros(NUMEL))
        wait_for(lambda count=count: server.rejected_connections >= count, f"{whose} key is counted")
    assert len(fake.joined) == 1
    assert bystander.works()


def test_an_impostor_at_the_servers_address_is_not_believed(wire: Wire) -> None:
    # It lets everybody in, and so learns the password; what it cannot learn is how to prove that it knows the token.
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
            with pytest.raises(ExchangeError, match="another program has taken the place of the server"):
                exchange.join(hello(fake.layout), torch.zeros(10))
            playing.result()
        exchange.close()
        fake.close()
    finally:
        context.destroy(0)


def test_a_server_that_was_started_anew_is_not_taken_for_the_old_one(wire: Wire) -> None:
    fake, server = wire.server(10, token="shared")
    assert server.local_endpoints is not None
    exchange = wire.worker(replace(server.local_endpoints, incarnation="start-0"), fake)
    with pytest.raises(ExchangeError, match="was started anew"):
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
        [frames.BEAT + b"{}"],
        [frames.ASK + ask(1).encode()],
        [frames.ASK + b"{}"],
        [frames.LEASE + b"{}"],
        [NOT_A_TRANSFER, bytes(100)],
        [frames.CREDIT],
        [frames.BYE],
    ],
    ids=lambda parts: f"{parts[0][:8]!r}x{len(parts)}",
)
def test_nonsense_from_somebody_unknown_is_counted(way: Open, wire: Wire, parts: list[bytes]) -> None:
    fake, server, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    stranger = wire.raw(endpoints)
    stranger.say(*parts)
    stranger.hear(frames.UNKNOWN)
    assert server.rejected_messages == 1
    assert bystander.works()
    assert not fake.departed


BROKEN_WORDS: dict[str, list[bytes]] = {
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
    "request for data in the wrong place": [frames.ASK + ask(1).encode()],
    "hello without nonce": [frames.HELLO + hello(layout_of(NUMEL)).encode()],
}


@pytest.mark.parametrize("case", BROKEN_WORDS)
def test_nonsense_from_a_worker_is_counted_and_ends_that_worker_alone(way: Open, wire: Wire, case: str) -> None:
    fake, server, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    worker = wire.raw(endpoints)
    worker.greet(fake.layout)
    worker.say(*BROKEN_WORDS[case])
    assert b"gave worker 1 up" in worker.hear(frames.REFUSE)[0]
    assert server.rejected_messages == 1
    assert [departed[:2] for departed in fake.departed] == [(1, "life-1")]
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
def test_a_broken_upload_never_reaches_the_model(way: Open, wire: Wire, case: str) -> None:
    fake, server, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    worker = wire.raw(endpoints)
    worker.greet(fake.layout)
    worker.say(frames.PUSH + push(1).encode())
    worker.hear(frames.GO)
    worker.say(*BROKEN_UPLOADS[case])
    assert b"sent nonsense" in worker.hear(frames.REFUSE)[0]
    assert server.rejected_messages == 1
    assert not fake.pushed
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    # What it goes on sending does nothing either.
    worker.say(frames.pack_part(frames.DATA, 1, 0), bytes(frames.FRAME_BYTES))
    worker.say(frames.PUSH + push(2).encode())
    worker.hear(frames.UNKNOWN)
    assert bystander.works()
    assert [pushed.worker for pushed, _ in fake.pushed] == [9]


def test_an_oversized_frame_ends_the_connection_before_it_is_taken_in(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    worker = wire.raw(endpoints)
    worker.greet(fake.layout)
    worker.say(frames.PUSH + push(1).encode())
    worker.hear(frames.GO)
    worker.say(frames.pack_part(frames.DATA, 1, 0), bytes(frames.MAX_FRAME_BYTES + 1))
    wait_for(lambda: fake.departed, "the connection is dropped")
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    assert server.bytes_received < frames.FRAME_BYTES
    assert bystander.works()


def test_hello_twice_over_one_connection_is_one_worker(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way(NUMEL)
    worker = wire.raw(endpoints)
    worker.greet(fake.layout)
    worker.greet(fake.layout)
    worker.close()
    wait_for(lambda: fake.departed, "its end is noticed")
    assert fake.departed == [(1, "life-1", "its connection ended")]


BROKEN_REQUESTS: dict[str, bytes] = {
    "empty": frames.ASK,
    "not json": frames.ASK + b"\xff\xfe",
    "deep": frames.ASK + b"[" * 50_000,
    "no fields": frames.ASK + b"{}",
    "huge numbers": frames.ASK + replace(ask(1), items=2**60).encode(),
    "a name that is too long": frames.ASK + replace(ask(1), stream="x" * 20_000).encode(),
    "another worker's": frames.ASK + ask(1, worker=9, session="life-9").encode(),
    "another session's": frames.ASK + ask(1, session="life-2").encode(),
}


@pytest.mark.parametrize("case", BROKEN_REQUESTS)
def test_a_broken_request_for_data_is_counted_and_does_no_harm(way: Open, wire: Wire, case: str) -> None:
    fake, server, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    worker = wire.worker(endpoints, fake)
    worker.join(hello(fake.layout), torch.zeros(NUMEL))
    heart = wire.raw(endpoints)
    heart.say(frames.BEAT + frames.Beat(1, "life-1", "nonce").encode())
    heart.hear(frames.ANSWER)
    heart.say(BROKEN_REQUESTS[case])
    heart.hear(frames.UNKNOWN)
    assert server.rejected_messages == 1
    assert not fake.asked
    # Not even to its own worker.
    worker.request_lease(ask(1))
    assert worker.take_lease(1).start == 1
    assert bystander.works()
    assert not fake.departed


def test_somebody_who_only_asks_for_data_is_not_listened_to(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    fake.answering.clear()
    heart = wire.raw(endpoints)
    heart.say(frames.BEAT + frames.Beat(1, "life-1", "nonce").encode())
    for number in range(1, 100):
        heart.say(frames.ASK + ask(number).encode())
    wait_for(lambda: server.rejected_messages == 35, "what is too much is refused")
    assert len(fake.asked) == 64
    fake.answering.set()
    heart.hear(frames.LEASE)
    assert bystander.works()
    heart.say(frames.ASK + ask(100).encode())
    wait_for(lambda: len(fake.asked) == 65, "it is listened to again")


def test_an_impostor_s_lease_is_not_believed() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gate, router = context.socket(zmq.REP), context.socket(zmq.ROUTER)
    try:
        gate.bind("inproc://zeromq.zap.01")
        router.setsockopt(zmq.PLAIN_SERVER, 1)
        router.setsockopt(zmq.ZAP_DOMAIN, b"async_localsgd")
        router.setsockopt(zmq.LINGER, 0)
        router.bind("tcp://127.0.0.1:*")
        endpoints = Endpoints(router.get_string(zmq.LAST_ENDPOINT).rstrip("\0"), "start-1", "the-token")
        heart = Heart(zmq.Context.instance(), endpoints, 1, "life-1", 30.0)
        answer: Future[Lease] = Future()
        heart.ask(ask(1), answer)
        version, request, *_ = gate.recv_multipart()
        gate.send_multipart([version, request, b"200", b"OK", b"", b""])
        identity, beat = router.recv_multipart()
        assert beat[:1] == frames.BEAT
        assert router.recv_multipart()[1][:1] == frames.ASK
        router.send_multipart([identity, frames.LEASE + Lease(1, 0, 0, 9, None).encode()])
        router.send_multipart([identity, frames.ANSWER + frames.Answer("start-1", -1, "0" * 64).encode()])
        wait_for(lambda: heart.gone, "the impostor is noticed")
        assert not answer.done()
        heart.close()
    finally:
        context.destroy(0)
