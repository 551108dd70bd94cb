"""The target of the fuzz tests: the server's part of the wire without sockets and threads, and a real server.

A peer that gets this far knows the token. Unless it sends a complete push, its messages must not change the model, end
the server, or affect another worker.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import zmq

from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.messages import (
    MAX_TEXT,
    PROTOCOL_VERSION,
    Hello,
    JoinRequest,
    Lease,
    LeaseRequest,
    Message,
    Push,
    Reply,
    StatusRequest,
)
from lightning_async_localsgd.server.server import Server
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.hub import Hub
from tests.harness import make_coordinator
from tests.wire.fakes import hello, layout_of, lease_request, push

NUMEL = 10
INCARNATION = "start-1"


class _FakeFrame:
    """A received frame."""

    def __init__(self, data: bytes, descriptor: int) -> None:
        self.bytes = data
        self._descriptor = descriptor

    def get(self, option: int) -> int:
        return self._descriptor


class _FakeTracker:
    done = True


class FakeRouter:
    """Replaces the ROUTER socket. A connection's routing id is the number of its descriptor."""

    def __init__(self) -> None:
        self.inbox: deque[list[bytes]] = deque()
        self.open: set[bytes] = set()
        self.sent: dict[bytes, list[list[bytes]]] = {}
        self._current: deque[bytes] = deque()
        self._from = b""
        self._going: list[bytes] = []

    def recv(self, flags: int = 0, copy: bool = True) -> Any:
        if not self._current:
            if not self.inbox:
                raise zmq.Again
            self._current = deque(self.inbox.popleft())
            self._from = self._current[0]
        part = self._current.popleft()
        return part if copy else _FakeFrame(part, int(self._from))

    def recv_into(self, memory: memoryview, flags: int = 0) -> int:
        part = self._current.popleft()
        size = min(len(part), len(memory))
        memory[:size] = part[:size]
        return len(part)

    def getsockopt(self, option: int) -> int:
        assert option == zmq.RCVMORE
        return int(bool(self._current))

    def send(self, part: Any, flags: int = 0, copy: bool = True, track: bool = False) -> _FakeTracker:
        if not self._going and bytes(part) not in self.open:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self._going.append(bytes(part))
        if not flags & zmq.SNDMORE:
            identity, *parts = self._going
            self._going = []
            self.sent.setdefault(identity, []).append(parts)
        return _FakeTracker()

    def send_multipart(self, parts: Sequence[bytes], flags: int = 0) -> None:
        for number, part in enumerate(parts):
            self.send(part, zmq.SNDMORE if number < len(parts) - 1 else 0)


class FakeListener:
    """Replaces a bound listener."""

    def __init__(self) -> None:
        self.socket = FakeRouter()
        self.ends: list[int] = []

    def read_events(self) -> list[int]:
        ends, self.ends = self.ends, []
        return ends

    def mark_authenticated(self, descriptor: int) -> None:
        pass

    def is_open(self, descriptor: int) -> bool:
        return b"%d" % descriptor in self.socket.open

    def disconnect(self, descriptor: int) -> bool:
        self.close(descriptor)
        return True

    def close(self, descriptor: int) -> None:
        name = b"%d" % descriptor
        if name in self.socket.open:
            self.socket.open.discard(name)
            self.ends.append(descriptor)


Step = tuple[int, list[bytes] | None]
"""A connection and the message that it sends; None ends the connection."""

_MESSAGES: dict[bytes, type[Message]] = {
    frames.HELLO: Hello,
    frames.PUSH: Push,
    frames.PING: frames.Ping,
    frames.LEASE_REQUEST: LeaseRequest,
    frames.JOIN_REQUEST: JoinRequest,
    frames.STATUS_REQUEST: StatusRequest,
}
_KINDS = (*_MESSAGES, frames.DATA, frames.CREDIT, frames.BYE)
_NUMBERS = [-1, 0, 1, 2, 3, 2**31, 2**32, 2**53 - 1, 2**53, 2**64 - 1, 10**400, -(2**53)]
_TEXTS = ["", "0", "{}", "[]", "null", "1e999", '{"0":1}', '{"0":9}', '{"0":-1}', '{"0":[]}', '{"1":1e300}']
_TEXTS += ["\ud800", "\0", "x" * MAX_TEXT, "x" * (MAX_TEXT + 1), '{"0":' * 900, "life-1", "life-3"]


class FuzzerBytes(random.Random):
    """A source of randomness that returns the bytes of a fuzzer, and zeros after them."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    def getrandbits(self, count: int) -> int:
        size = -(-count // 8)
        part = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(part, "little") & ((1 << count) - 1)

    def random(self) -> float:
        return self.getrandbits(8) / 256


class RandomPeer:
    """A peer that knows the token and sends random messages, many of them valid.

    Args:
        chance: source of randomness.
        may_end_the_run: also send last pushes and requests to end training, as every peer with the token may.

    """

    def __init__(self, chance: random.Random, may_end_the_run: bool = False) -> None:
        self._random = chance
        self._may_end_the_run = may_end_the_run

    def conversation(self) -> list[Step]:
        """Return the first messages of a valid worker, up to some point, and random messages after them."""
        chance = self._random
        valid: list[Step] = [
            (1, [frames.HELLO + hello(layout_of(NUMEL), 0).encode(), bytes(frames.NONCE_BYTES)]),
            (2, [frames.PING + frames.Ping(0, "life-1", "00").encode()]),
            (1, [frames.pack_part(frames.CREDIT, 1, 1)]),
            (1, [frames.PUSH + push(1, 0, incarnation=INCARNATION).encode()]),
        ]
        return valid[: chance.randint(0, 4)] + [self._step() for _ in range(chance.randint(0, 25))]

    def _step(self) -> Step:
        chance = self._random
        if chance.random() < 0.05:
            return chance.randint(1, 3), None
        if chance.random() < 0.05:
            return chance.randint(1, 3), [chance.randbytes(chance.randint(0, 80))]
        kind = chance.choice(_KINDS)
        connection = 2 if kind in (frames.PING, frames.LEASE_REQUEST, frames.JOIN_REQUEST, frames.STATUS_REQUEST) else 1
        if chance.random() < 0.05:
            connection = chance.randint(1, 3)
        if kind in _MESSAGES:
            head = kind + self._body(_MESSAGES[kind])
        elif kind == frames.BYE:
            head = kind
        else:
            head = frames.pack_part(kind, self._transfer(), self._transfer())
        rest = [bytes(frames.NONCE_BYTES)] if kind == frames.HELLO else []
        # Any length except that of the whole model.
        if kind == frames.DATA or chance.random() < 0.05:
            rest.append(chance.randbytes(chance.choice([0, 1, 4 * NUMEL - 1, 4 * NUMEL + 1, 100])))
        if chance.random() < 0.05:
            rest = rest[1:]
        return connection, [head, *rest]

    def _transfer(self) -> int:
        return self._random.choice([0, 0, 1, 1, 1, 2, 3, 2**32, 2**64 - 1])

    def _body(self, form: type[Message]) -> bytes:
        chance = self._random
        body = {name: self._valid_value(name, str(field.type)) for name, field in form.__dataclass_fields__.items()}
        for _ in range(chance.choice([0, 0, 0, 1, 1, 2])):
            body[chance.choice(list(body))] = self._invalid_value()
        if chance.random() < 0.03:
            del body[chance.choice(list(body))]
        if not self._may_end_the_run:
            body.update({name: False for name in ("final", "stop") if name in body})
        data = json.dumps(body).encode()
        if chance.random() < 0.03:
            at = chance.randrange(len(data))
            data = data[:at] + chance.randbytes(3) + data[at + chance.randint(0, 5) :]
        return data

    def _valid_value(self, name: str, kind: str) -> Any:
        chance = self._random
        known: dict[str, list[Any]] = {
            "protocol": [PROTOCOL_VERSION],
            "worker": [*[0] * 20, 1, -1],
            "session": [*["life-1"] * 12, "life-2"],
            "nonce": ["00"],
            "incarnation": [INCARNATION, INCARNATION, "start-0"],
            "fingerprint": [layout_of(NUMEL).fingerprint],
            "items": [1, 2, 10],
            "int": [0, 1, 1, 2, 3],
            "bool": [False, True],
            "float": [0.0, 1.0, 2],
            "str": ["", "", *_TEXTS[:10]],
        }
        return chance.choice(known[name if name in known else kind])

    def _invalid_value(self) -> Any:
        chance = self._random
        return chance.choice(
            [chance.choice(_NUMBERS), chance.choice(_TEXTS), None, True, [], float("nan"), float("inf"), -1.0, 1e308]
        )


class FuzzTarget:
    """A server, connections of random peers, and a valid worker that checks the server."""

    def __init__(self) -> None:
        self.layout = layout_of(NUMEL)
        self.coordinator = make_coordinator(1, total=None, local_steps=5, layout=self.layout, incarnation=INCARNATION)
        self.model = self.coordinator.model
        self.buffers = BufferPool(NUMEL, max_active=2, max_total=4)
        self.server = Server(self.coordinator, self.buffers, threaded=False)
        self.listener = FakeListener()
        self._commands: deque[Callable[[], None]] = deque()
        self.hub = Hub(self.server, "the token", 30.0, self._commands.append)
        self._lives = 0

    def feed(self, connection: int, parts: Sequence[bytes]) -> None:
        """Deliver a message over a connection."""
        name = b"%d" % connection
        self.listener.socket.open.add(name)
        self.listener.socket.inbox.append([name, *parts])
        self.turn()

    def turn(self) -> None:
        """Do what the wire's thread does in one iteration."""
        self._run_commands()
        self.hub.collect_closed(self.listener)  # type: ignore[arg-type]
        while self.hub.receive(self.listener):  # type: ignore[arg-type]
            self._run_commands()
        self.hub.handle_closed()
        self.hub.assign_buffers()
        self.hub.tick()

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def hang_up(self, connection: int) -> None:
        """End a connection."""
        self.listener.close(connection)
        self.turn()

    def last_sent(self, connection: int, kind: bytes) -> list[bytes]:
        """Return the last message of ``kind`` that was sent over a connection."""
        return [parts for parts in self.listener.socket.sent[b"%d" % connection] if parts[0][:1] == kind][-1]

    def check(self) -> None:
        """Check that a valid worker can join, get a lease, push and leave."""
        self._lives += 1
        session, bulk, heartbeat = f"good-{self._lives}", 2 * self._lives + 1000, 2 * self._lives + 1001
        version = self.model.version
        self.feed(bulk, [frames.HELLO + hello(self.layout, 0, session).encode(), bytes(frames.NONCE_BYTES)])
        self.feed(heartbeat, [frames.PING + frames.Ping(0, session, "00").encode()])
        assert self.last_sent(heartbeat, frames.PONG)
        # Another stream, because the random peer may have set the length of stream "0".
        request = dataclasses.replace(lease_request(1, 0, session), stream="good")
        self.feed(heartbeat, [frames.LEASE_REQUEST + request.encode()])
        lease = Lease.decode(self.last_sent(heartbeat, frames.LEASE)[0][1:])
        assert lease.refused is None
        reply = self._dispatched(bulk)
        assert reply.version == version
        header = dataclasses.replace(push(1, 0, session, INCARNATION), base_version=version)
        self.feed(bulk, [frames.PUSH + header.encode()])
        self.feed(bulk, [frames.pack_part(frames.DATA, 1, 0), torch.ones(NUMEL).numpy().tobytes()])
        reply = self._dispatched(bulk)
        assert (reply.sequence, reply.version, reply.refused) == (1, version + 1, None)
        self.feed(bulk, [frames.BYE])
        self.hang_up(heartbeat)
        self.hang_up(bulk)
        self.listener.socket.sent.clear()

    def _dispatched(self, connection: int) -> Reply:
        header, reply = self.last_sent(connection, frames.REPLY)
        transfer = frames.unpack_transfer(header)
        assert self.last_sent(connection, frames.MODEL)[0] == frames.pack_part(frames.MODEL, transfer, 0)
        self.feed(connection, [frames.pack_part(frames.CREDIT, transfer, 1)])
        return Reply.decode(reply)


def run_random_conversation(chance: random.Random) -> None:
    """Run a random conversation, and check that it leaves nothing behind."""
    target = FuzzTarget()
    version = target.model.version
    for connection, parts in RandomPeer(chance).conversation():
        if parts is None:
            target.hang_up(connection)
        else:
            target.feed(connection, parts)
    assert target.model.version == version
    for connection in (1, 2, 3):
        target.hang_up(connection)
    assert target.buffers.in_use == 0
    target.check()
    assert target.buffers.in_use == 0
