"""Fuzz tests of the server's port: random messages and bytes change nothing, keep no memory, and log no error.

Every part runs with some inputs in the ordinary suite, and with many more among the slow tests: more than 10,000
messages over a socket, and 3,000 streams of bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.protocol.messages import (
    Hello,
    JoinInfo,
    JoinRequest,
    Lease,
    LeaseRequest,
    Message,
    MessageError,
    Push,
    Reply,
    StatusRequest,
)
from lightning_async_localsgd.wire import WireServer, frames
from lightning_async_localsgd.wire.auth import password
from tests.wire.fakes import FakeServer, RawWorker, WireHarness, wait_for
from tests.wire.fuzzing import NUMEL, RandomPeer, run_random_conversation
from tests.wire.test_hostile import ZMTP3, Bystander, dial
from tests.wire.test_unauthenticated import MIB, memory

values = st.one_of(
    st.integers(-2, 2**70), st.text(max_size=40), st.none(), st.booleans(), st.floats(), st.lists(st.none())
)


@st.composite
def bodies(draw: st.DrawFn, form: type[Message]) -> bytes:
    """Draw a message with its fields, or nearly so."""
    right = {"int": st.integers(-2, 2**53), "bool": st.booleans(), "float": st.floats(), "str": st.text(max_size=40)}
    fields = form.__dataclass_fields__.items()
    body = {name: draw(st.one_of(right.get(str(field.type), values), values)) for name, field in fields}
    body.update(draw(st.dictionaries(st.sampled_from(["x", *body]), values, max_size=1)))
    return json.dumps(body).encode()


def searching(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(
        max_examples=examples,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@contextlib.contextmanager
def unaffected(caplog: pytest.LogCaptureFixture, fake: FakeServer, server: WireServer) -> Iterator[None]:
    """Check that the model and the memory stay as they are, and that no error is logged."""
    version, before = fake.version, memory()
    with caplog.at_level(logging.ERROR):
        yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert memory() - before < 64 * MIB
    assert fake.version == version
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")


# ------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "form", [Hello, Push, Reply, LeaseRequest, Lease, JoinRequest, JoinInfo, StatusRequest, frames.Ping, frames.Pong]
)
@searching(150)
@given(data=st.data())
def test_random_data_is_decoded_to_a_valid_message_or_refused(form: type[Message], data: st.DataObject) -> None:
    try:
        message = form.decode(data.draw(st.one_of(st.binary(max_size=200), bodies(form))))
    except MessageError:
        return
    assert form.decode(message.encode()) == message


# --------------------------------------- with the token, without sockets, with a real server


seeds = st.integers(0, 2**64 - 1)
"""Seeds of conversations. The conversations are made without hypothesis, which is much faster."""


@searching(200)
@given(seed=seeds)
def test_random_conversation_does_not_end_the_server(seed: int) -> None:
    run_random_conversation(random.Random(seed))


@pytest.mark.slow
@searching(800)
@given(seed=seeds)
def test_many_random_conversations_do_not_end_the_server(seed: int) -> None:
    run_random_conversation(random.Random(seed))


@pytest.mark.slow
def test_coverage_guided_conversations_do_not_end_the_server(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="a coverage-guided fuzzer, which is not there for all versions of Python")
    script = Path(__file__).with_name("guided_fuzz.py")
    command = [sys.executable, str(script), "-runs=1000", "-seed=1", "-max_len=2000", "-len_control=0"]
    # In a folder of its own, where the fuzzer would write an input that fails.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Done 1000 runs" in done.stderr


# ------------------------------------------------- with the token, over a real socket


def run_conversations(wire: WireHarness, caplog: pytest.LogCaptureFixture, examples: int) -> int:
    """Run conversations over sockets. Return the number of messages sent."""
    fake, server = wire.server(NUMEL)
    sent = 0
    assert server.local_endpoints is not None
    bystander = Bystander(wire, fake, server.local_endpoints)
    steady: RawWorker = wire.raw(server.local_endpoints)

    @searching(examples)
    @given(seed=seeds)
    def search(seed: int) -> None:
        nonlocal sent
        ends: dict[int, RawWorker] = {}

        def send(connection: int, parts: list[bytes]) -> bool:
            """Send a message. If the session has replaced its connection, close it and return False."""
            try:
                ends[connection].socket.send_multipart(parts, zmq.NOBLOCK)
            except zmq.Again:
                ends.pop(connection).close()
                return False
            return True

        for connection, parts in RandomPeer(random.Random(seed), may_end_the_run=True).conversation():
            if parts is not None:
                if connection not in ends or not send(connection, parts):
                    ends[connection] = wire.raw(server.local_endpoints)
                    ends[connection].send(*parts)
                sent += 1
            elif connection in ends:
                ends.pop(connection).close()
        for connection in list(ends):
            # When this ping is answered, the server has read everything before it.
            if send(connection, [frames.PING + frames.Ping(0, "life-1", "00").encode()]):
                end = ends.pop(connection)
                wait_for(lambda end=end: end.has_pong() or not end.socket.poll(0, zmq.POLLOUT), "all messages are read")
                end.close()

    with unaffected(caplog, fake, server):
        search()
        steady.send(frames.PING + frames.Ping(9, "life-9", "00").encode())
        steady.receive(frames.PONG)
    assert bystander.works()
    assert not [session for session in fake.lost_sessions if session[0] == 9]
    return sent


def test_random_messages_over_sockets_do_not_affect_other_workers(
    wire: WireHarness, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_conversations(wire, caplog, 60) > 500


@pytest.mark.slow
def test_many_random_messages_over_sockets_do_not_affect_other_workers(
    wire: WireHarness, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_conversations(wire, caplog, 800) > 10_000


# ------------------------------------------- bytes, before, in and after the handshake


def frame(body: bytes, flags: int) -> bytes:
    return (
        bytes([flags, len(body)]) + body
        if len(body) < 256
        else bytes([flags | 2]) + len(body).to_bytes(8, "big") + body
    )


def command(name: bytes, body: bytes) -> bytes:
    return frame(bytes([len(name)]) + name + body, 4)


@st.composite
def streams(draw: st.DrawFn, token: str) -> bytes:
    """Draw the bytes of a connection: those of a valid worker, with random changes."""
    greeting = ZMTP3 + draw(st.sampled_from([b"PLAIN", b"CURVE", b"NULL", b"GSSAPI"])).ljust(20, b"\0") + bytes(32)
    right = password(token)
    login = command(b"HELLO", b"\x06worker" + bytes([len(right)]) + right)
    ready = command(b"INITIATE", b"\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0")
    ping = frame(frames.PING + frames.Ping(1, "life-1", "00").encode(), 0)
    pieces = [greeting, login, ready, ping, draw(st.binary(max_size=300))]
    stream = b"".join(pieces[: draw(st.integers(0, 5))])
    for _ in range(draw(st.integers(0, 3))):
        if not stream:
            break
        at = draw(st.integers(0, len(stream) - 1))
        change = draw(st.sampled_from(["flip", "cut", "insert", "double"]))
        if change == "flip":
            stream = stream[:at] + bytes([stream[at] ^ draw(st.integers(1, 255))]) + stream[at + 1 :]
        elif change == "cut":
            stream = stream[:at]
        elif change == "insert":
            stream = stream[:at] + draw(st.binary(min_size=1, max_size=20)) + stream[at:]
        else:
            stream = stream[:at] + stream[at // 2 :]
    return stream + draw(st.binary(max_size=40))


def run_streams(
    open_wire: Callable[..., Any], wire: WireHarness, caplog: pytest.LogCaptureFixture, examples: int
) -> None:
    fake, server, endpoints = open_wire(NUMEL)
    bystander = Bystander(wire, fake, endpoints)

    @searching(examples)
    @given(stream=streams(endpoints.token))
    def search(stream: bytes) -> None:
        with dial(endpoints) as connection, contextlib.suppress(OSError):
            connection.sendall(stream)

    with unaffected(caplog, fake, server):
        search()
        assert len(fake.joined) == 1
    assert bystander.works()
    assert not fake.lost_sessions


def test_random_bytes_do_not_affect_any_worker(
    open_wire: Callable[..., Any], wire: WireHarness, caplog: pytest.LogCaptureFixture
) -> None:
    run_streams(open_wire, wire, caplog, 150)


@pytest.mark.slow
def test_many_random_bytes_do_not_affect_any_worker(
    open_wire: Callable[..., Any], wire: WireHarness, caplog: pytest.LogCaptureFixture
) -> None:
    run_streams(open_wire, wire, caplog, 1000)
