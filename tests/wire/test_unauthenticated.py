"""Peers without the token have no effect and need no memory, and the token itself is never shown."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.options import ExchangeOptions, check_token
from lightning_async_localsgd.wire import Endpoints, WireServer, frames
from lightning_async_localsgd.wire.auth import Secrets, require_encryption
from lightning_async_localsgd.wire.join_info import request_join_info
from lightning_async_localsgd.wire.listener import _MAX_UNAUTHENTICATED
from tests.wire.fakes import FakeServer, WireHarness, hello, layout_of, push, wait_for
from tests.wire.test_hostile import ZMTP3, Bystander, dial

OpenWire = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
NUMEL = frames.FRAME_BYTES // 2
TOKEN = "a-token-that-nobody-else-knows"
MIB = 2**20


def memory() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture
def silent_connections() -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        connections: list[socket.socket] = []
        stack.callback(lambda: [connection.close() for connection in connections])
        yield connections


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while data := connection.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return bool(data)


def test_silent_connections_are_limited_and_keep_no_worker_out(
    open_wire: OpenWire, wire: WireHarness, silent_connections: list[socket.socket]
) -> None:
    fake, _, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(4 * _MAX_UNAUTHENTICATED):
        silent_connections.append(dial(endpoints))
    wait_for(lambda: sum(map(is_open, silent_connections)) <= _MAX_UNAUTHENTICATED, "the oldest are closed")
    # The server shuts connections down, which their other end notices at once, and libzmq frees the descriptors after.
    wait_for(
        lambda: len(os.listdir("/proc/self/fd")) - before - len(silent_connections) <= _MAX_UNAUTHENTICATED + 8,
        "their descriptors are free",
    )
    assert bystander.works()
    newcomer = wire.worker(endpoints, fake)
    newcomer.join(hello(fake.layout, 2, "life-2"), torch.zeros(NUMEL))
    assert not fake.lost_sessions


def test_data_from_unauthenticated_peers_takes_no_memory(
    open_wire: OpenWire, wire: WireHarness, silent_connections: list[socket.socket]
) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    received = server.bytes_received
    before = memory()
    mechanism = b"CURVE" if endpoints.encrypted else b"PLAIN"
    start = ZMTP3 + mechanism.ljust(20, b"\0") + bytes(32)
    bodies = [
        # A command that never ends, a huge command, a message before the handshake, random bytes.
        b"\x06" + (MIB).to_bytes(8, "big") + bytes(MIB - 1),
        b"\x06" + (2**40).to_bytes(8, "big") + bytes(MIB),
        b"\x02" + (MIB).to_bytes(8, "big") + bytes(MIB),
        os.urandom(MIB),
    ]
    for number in range(100):
        connection = dial(endpoints)
        connection.settimeout(0.2)
        silent_connections.append(connection)
        with contextlib.suppress(OSError):
            connection.sendall(start + bodies[number % len(bodies)])
    assert bystander.works()
    # Most of the data is not even read from the system's buffers.
    assert memory() - before < 100 * MIB
    assert server.bytes_received - received < 4 * NUMEL + 100_000
    assert not fake.lost_sessions
    assert len(fake.joined) == 1
    assert len(fake.pushed) == 1


def test_replayed_connection_is_refused(wire: WireHarness) -> None:
    fake, server = wire.server(NUMEL, ipc=False, tcp=True, encrypt=True, token=TOKEN)
    proxy, endpoints = wire.proxy(server.endpoints, record=True)
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(NUMEL)
    exchange.join(hello(fake.layout), model)
    exchange.push(push(1), torch.ones(NUMEL), model)
    request_join_info(endpoints.address, TOKEN, -1, encrypted=True, timeout=30.0)
    exchange.close()
    wait_for(lambda: fake.lost_sessions, "the goodbye arrives")
    joined, version, received = len(fake.joined), fake.version, server.bytes_received
    assert len(proxy.recordings) == 3
    assert server.endpoints is not None
    for count, recording in enumerate(proxy.recordings, start=1):
        assert len(recording.to_server) > 400
        assert TOKEN.encode() not in recording.to_server + recording.to_client
        with dial(server.endpoints) as connection, contextlib.suppress(OSError):
            # In the same steps as recorded: greeting, hello, and the rest.
            for at in (0, 64, 64 + 202):
                connection.sendall(recording.to_server[at:] if at > 64 else recording.to_server[at : at + 202])
                time.sleep(0.05)
            while connection.recv(65536):
                pass
        wait_for(lambda count=count: server.rejected_connections == count, "the connection is dropped")
    assert server.bytes_received == received
    assert (len(fake.joined), fake.version, fake.join_requests) == (joined, version, [-1])
    assert not fake.revived
    assert Bystander(wire, fake, server.endpoints).works()


def test_token_is_never_shown(
    open_wire: OpenWire, wire: WireHarness, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = "another-token-that-is-wrong"
    with caplog.at_level(logging.DEBUG):
        fake, server, endpoints = open_wire(token=TOKEN)
        exchange = wire.worker(endpoints, fake)
        exchange.join(hello(fake.layout), torch.zeros(1000))
        wrong_worker = wire.worker(
            Endpoints.from_token(endpoints.address, "", wrong, endpoints.encrypted), fake, connect_timeout=1.0
        )
        with pytest.raises(ExchangeError) as refused:
            wrong_worker.join(hello(fake.layout), torch.zeros(1000))
        wait_for(lambda: server.rejected_connections, "the connection is counted")
        shown = [repr(part) for part in (endpoints, server, exchange, server._secrets, exchange._heartbeat)]
    texts = [*shown, str(refused.value), caplog.text, *capfd.readouterr()]
    secrets = [endpoints.token, endpoints.secret_key, endpoints.server_key, wrong]
    for secret in secrets:
        assert secret is None or not any(secret in text for text in texts)
    assert TOKEN not in Path("/proc/self/cmdline").read_text()
    assert pickle.loads(pickle.dumps(endpoints)) == endpoints


def test_keys_depend_on_the_token_only() -> None:
    first, same, other = (
        Endpoints.from_token("tcp://h:1", i, t, True) for i, t in (("a", "T1"), ("b", "T1"), ("a", "T2"))
    )
    assert first.server_key == same.server_key
    assert first.secret_key == same.secret_key
    assert len({first.server_key, first.public_key, first.secret_key, other.server_key, other.public_key}) == 5
    keys = Secrets("T1", encrypt=True)
    assert keys.server_keys is not None
    assert keys.server_keys[0].decode() == first.server_key
    assert zmq.curve_public(keys.server_keys[1]) == keys.server_keys[0]
    assert Endpoints.from_token("tcp://h:1", "a", "T1", False) == Endpoints("tcp://h:1", "a", "T1")


@pytest.mark.parametrize(
    ("address", "same_host"),
    [
        ("ipc://@async_localsgd_1", True),
        ("tcp://127.0.0.1:29600", True),
        ("tcp://[::1]:29600", True),
        ("tcp://localhost:29600", True),
        ("tcp://10.0.0.1:29600", False),
        ("tcp://[fd00::1]:29600", False),
        ("tcp://gpu-node-1:29600", False),
    ],
)
def test_loopback_and_ipc_addresses_are_on_the_same_host(address: str, same_host: bool) -> None:
    assert Endpoints(address, "", "").same_host is same_host


@pytest.mark.parametrize("token", ["", "short", "x" * 15, " " + "x" * 20, "x" * 20 + "\n", "x" * 10 + "\0" + "x" * 10])
def test_invalid_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match=r"ASYNC_LOCALSGD_TOKEN has .*secrets.token_hex") as refused:
        check_token(token, "ASYNC_LOCALSGD_TOKEN")
    assert len(token) < 2 or token not in str(refused.value)
    assert check_token("x" * 16, "token") == "x" * 16


def test_other_hosts_without_encryption_need_insecure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert require_encryption(ExchangeOptions(), distant=True) is True
    assert require_encryption(ExchangeOptions(), distant=False) is False
    assert require_encryption(ExchangeOptions(encrypt=True), distant=False) is True
    assert require_encryption(ExchangeOptions(encrypt=False), distant=False) is False
    with pytest.raises(ValueError, match=r"exchange\.encrypt=False.*exchange\.insecure=True"):
        require_encryption(ExchangeOptions(encrypt=False), distant=True)
    assert not caplog.records
    assert require_encryption(ExchangeOptions(encrypt=False, insecure=True), distant=True) is False
    assert require_encryption(ExchangeOptions(insecure=True), distant=True) is True
    assert ["exchange.insecure=True" in record.message for record in caplog.records] == [True]
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    with pytest.raises(ValueError, match=r"without CURVE.*pip install pyzmq.*exchange\.insecure=True"):
        require_encryption(ExchangeOptions(), distant=True)
    with pytest.raises(ValueError, match=r"exchange\.encrypt=True is not possible"):
        require_encryption(ExchangeOptions(encrypt=True, insecure=True), distant=True)
    assert require_encryption(ExchangeOptions(), distant=False) is False
    assert require_encryption(ExchangeOptions(insecure=True), distant=True) is False
    with pytest.raises(ValueError, match=r"exchange\.insecure='yes'"):
        ExchangeOptions(insecure="yes")  # type: ignore[arg-type]


def test_worker_with_the_wrong_layout_receives_only_the_layout(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    sent = server.bytes_sent
    exchange = wire.worker(endpoints, fake, layout=layout_of(7))
    with pytest.raises(ExchangeError, match="differs from rank 0"):
        exchange.join(hello(layout_of(7)), torch.zeros(7))
    assert server.bytes_sent - sent < 1000
    assert not fake.joined
