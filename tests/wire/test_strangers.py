"""Without the token: nothing is read, written or kept, and the token itself is nowhere to be seen."""

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

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.options import ExchangeOptions
from lightning_async_localsgd.wire import Endpoints, WireServer, frames
from lightning_async_localsgd.wire.auth import Secrets, checked_token, require_encryption
from lightning_async_localsgd.wire.knock import knock
from lightning_async_localsgd.wire.way import _MOST_STRANGERS
from tests.wire.fakes import FakeServer, Wire, hello, layout_of, push, wait_for
from tests.wire.test_hostile import ZMTP3, Bystander, dial

Open = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
NUMEL = frames.FRAME_BYTES // 2
TOKEN = "a-token-that-nobody-else-knows"
MIB = 2**20


def memory() -> int:
    """Bytes of this process in memory."""
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


def test_connections_that_say_nothing_are_few_and_keep_nobody_out(
    way: Open, wire: Wire, silent_connections: list[socket.socket]
) -> None:
    fake, _, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(4 * _MOST_STRANGERS):
        silent_connections.append(dial(endpoints))
    most = _MOST_STRANGERS + 8
    wait_for(lambda: sum(map(is_open, silent_connections)) <= _MOST_STRANGERS, "the oldest are closed")
    ours = len(os.listdir("/proc/self/fd")) - before - len(silent_connections)
    assert ours <= most
    assert bystander.works()
    newcomer = wire.worker(endpoints, fake)
    newcomer.join(hello(fake.layout, 2, "life-2"), torch.zeros(NUMEL))
    assert not fake.departed


def test_what_strangers_send_takes_no_memory(way: Open, wire: Wire, silent_connections: list[socket.socket]) -> None:
    fake, server, endpoints = way(NUMEL)
    bystander = Bystander(wire, fake, endpoints)
    received = server.bytes_received
    before = memory()
    mechanism = b"CURVE" if endpoints.encrypted else b"PLAIN"
    start = ZMTP3 + mechanism.ljust(20, b"\0") + bytes(32)
    bodies = [
        # A command that never ends, one that claims to be huge, a message before the handshake, bytes of no kind.
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
    # Most of it is not even taken from the system's buffers.
    assert memory() - before < 100 * MIB
    assert server.bytes_received - received < 4 * NUMEL + 100_000
    assert not fake.departed
    assert len(fake.joined) == 1
    assert len(fake.pushed) == 1


def test_a_recorded_connection_that_is_replayed_is_no_worker(wire: Wire) -> None:
    fake, server = wire.server(NUMEL, ipc=False, tcp=True, encrypt=True, token=TOKEN)
    road, endpoints = wire.road(server.endpoints, record=True)
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(NUMEL)
    exchange.join(hello(fake.layout), model)
    exchange.push(push(1), torch.ones(NUMEL), model)
    knock(endpoints.address, TOKEN, -1, encrypted=True, timeout=30.0)
    exchange.close()
    wait_for(lambda: fake.departed, "its goodbye")
    joined, version, received = len(fake.joined), fake.version, server.bytes_received
    assert len(road.recordings) == 3
    assert server.endpoints is not None
    for count, recording in enumerate(road.recordings, start=1):
        assert len(recording.to_server) > 400
        assert TOKEN.encode() not in recording.to_server + recording.to_client
        with dial(server.endpoints) as connection, contextlib.suppress(OSError):
            # Also in the steps in which it was sent: the greeting, the hello, and the rest.
            for at in (0, 64, 64 + 202):
                connection.sendall(recording.to_server[at:] if at > 64 else recording.to_server[at : at + 202])
                time.sleep(0.05)
            while connection.recv(65536):
                pass
        wait_for(lambda count=count: server.rejected_connections == count, "it is dropped")
    assert server.bytes_received == received
    assert (len(fake.joined), fake.version, fake.introduced) == (joined, version, [-1])
    assert not fake.revived
    assert Bystander(wire, fake, server.endpoints).works()


def test_the_token_is_nowhere_to_be_seen(
    way: Open, wire: Wire, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = "another-token-that-is-wrong"
    with caplog.at_level(logging.DEBUG):
        fake, server, endpoints = way(token=TOKEN)
        exchange = wire.worker(endpoints, fake)
        exchange.join(hello(fake.layout), torch.zeros(1000))
        mistaken = wire.worker(
            Endpoints.of(endpoints.address, "", wrong, endpoints.encrypted), fake, connect_timeout=1.0
        )
        with pytest.raises(ExchangeError) as refused:
            mistaken.join(hello(fake.layout), torch.zeros(1000))
        wait_for(lambda: server.rejected_connections, "it is counted")
        shown = [repr(part) for part in (endpoints, server, exchange, server._secrets, exchange._heart)]
    said = [*shown, str(refused.value), caplog.text, *capfd.readouterr()]
    secrets = [endpoints.token, endpoints.secret_key, endpoints.server_key, wrong]
    for secret in secrets:
        assert secret is None or not any(secret in text for text in said)
    assert TOKEN not in Path("/proc/self/cmdline").read_text()
    assert pickle.loads(pickle.dumps(endpoints)) == endpoints


def test_keys_follow_from_the_token_and_from_nothing_else() -> None:
    one, same, other = (Endpoints.of("tcp://h:1", i, t, True) for i, t in (("a", "T1"), ("b", "T1"), ("a", "T2")))
    assert one.server_key == same.server_key
    assert one.secret_key == same.secret_key
    assert len({one.server_key, one.public_key, one.secret_key, other.server_key, other.public_key}) == 5
    keys = Secrets("T1", encrypt=True)
    assert keys.server_keys is not None
    assert keys.server_keys[0].decode() == one.server_key
    assert zmq.curve_public(keys.server_keys[1]) == keys.server_keys[0]
    assert Endpoints.of("tcp://h:1", "a", "T1", False) == Endpoints("tcp://h:1", "a", "T1")


@pytest.mark.parametrize(
    ("address", "nearby"),
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
def test_only_on_one_machine_is_nobody_listening_the_same_as_the_end(address: str, nearby: bool) -> None:
    assert Endpoints(address, "", "").nearby is nearby


@pytest.mark.parametrize("token", ["", "short", "x" * 15, " " + "x" * 20, "x" * 20 + "\n", "x" * 10 + "\0" + "x" * 10])
def test_a_token_that_is_no_good_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match=r"ASYNC_LOCALSGD_TOKEN has .*secrets.token_hex") as refused:
        checked_token(token, "ASYNC_LOCALSGD_TOKEN")
    assert len(token) < 2 or token not in str(refused.value)
    assert checked_token("x" * 16, "token") == "x" * 16


def test_other_hosts_without_encryption_are_refused_unless_told(
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
    with pytest.raises(ValueError, match=r"exchange\.encrypt=True is impossible"):
        require_encryption(ExchangeOptions(encrypt=True, insecure=True), distant=True)
    assert require_encryption(ExchangeOptions(), distant=False) is False
    assert require_encryption(ExchangeOptions(insecure=True), distant=True) is False
    with pytest.raises(ValueError, match=r"exchange\.insecure='yes'"):
        ExchangeOptions(insecure="yes")  # type: ignore[arg-type]


def test_a_worker_with_the_wrong_layout_learns_nothing_but_the_layout(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way(NUMEL)
    sent = server.bytes_sent
    exchange = wire.worker(endpoints, fake, layout=layout_of(7))
    with pytest.raises(ExchangeError, match="is not that of rank 0"):
        exchange.join(hello(layout_of(7)), torch.zeros(7))
    assert server.bytes_sent - sent < 1000
    assert not fake.joined
