"""What the fuzz tests throw messages at: the server's part of the wire without sockets and threads, and a real server.

Whoever gets so far knows the token. Nothing that he says may reach the model unless it is a whole push, nor end the
server, nor keep a worker in good order from its work.
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

from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.buffers import BufferPool
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.messages import (
    MAX_TEXT,
    PROTOCOL_VERSION,
    Hello,
    Knock,
    Lease,
    LeaseRequest,
    Message,
    Push,
    Reply,
)
from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.server import Server
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.hub import Hub
from tests.wire.fakes import ask, hello, layout_of, push

NUMEL = 10
INCARNATION = "start-1"


class _Piece:
    """A received frame."""

    def __init__(self, data: bytes, descriptor: int) -> None:
        self.bytes = data
        self._descriptor = descriptor

    def get(self, option: int) -> int:
        return self._descriptor


class _Sent:
    done = True


class Line:
    """In place of the ROUTER socket; a connection's name is the number of its descriptor."""

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
        return part if copy else _Piece(part, int(self._from))

    def recv_into(self, memory: memoryview, flags: int = 0) -> int:
        part = self._current.popleft()
        size = min(len(part), len(memory))
        memory[:size] = part[:size]
        return len(part)

    def getsockopt(self, option: int) -> int:
        assert option == zmq.RCVMORE
        return int(bool(self._current))

    def send(self, part: Any, flags: int = 0, copy: bool = True, track: bool = False) -> _Sent:
        if not self._going and bytes(part) not in self.open:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self._going.append(bytes(part))
        if not flags & zmq.SNDMORE:
            identity, *parts = self._going
            self._going = []
            self.sent.setdefault(identity, []).append(parts)
        return _Sent()

    def send_multipart(self, parts: Sequence[bytes], flags: int = 0) -> None:
        for number, part in enumerate(parts):
            self.send(part, zmq.SNDMORE if number < len(parts) - 1 else 0)


class Way:
    """In place of a bound address."""

    def __init__(self) -> None:
        self.socket = Line()
        self.ends: list[int] = []

    def events(self) -> list[int]:
        ends, self.ends = self.ends, []
        return ends

    def introduce(self, descriptor: int) -> None:
        pass

    def is_open(self, descriptor: int) -> bool:
        return b"%d" % descriptor in self.socket.open

    def hang_up(self, descriptor: int) -> bool:
        self.close(descriptor)
        return True

    def close(self, descriptor: int) -> None:
        name = b"%d" % descriptor
        if name in self.socket.open:
            self.socket.open.discard(name)
            self.ends.append(descriptor)


Step = tuple[int, list[bytes] | None]
"""What a connection says; None ends it."""

_FORMS: dict[bytes, type[Message]] = {
    frames.HELLO: Hello,
    frames.PUSH: Push,
    frames.BEAT: frames.Beat,
    frames.ASK: LeaseRequest,
    frames.KNOCK: Knock,
}
_KINDS = (*_FORMS, frames.DATA, frames.CREDIT, frames.BYE)
_NUMBERS = [-1, 0, 1, 2, 3, 2**31, 2**32, 2**53 - 1, 2**53, 2**64 - 1, 10**400, -(2**53)]
_TEXTS = ["", "0", "{}", "[]", "null", "1e999", '{"0":1}', '{"0":9}', '{"0":-1}', '{"0":[]}', '{"1":1e300}']
_TEXTS += ["\ud800", "\0", "x" * MAX_TEXT, "x" * (MAX_TEXT + 1), '{"0":' * 900, "life-1", "life-3"]


class Bytes(random.Random):
    """No chance at all: what a fuzzer has put together decides, and zeros after that."""

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


class Speaker:
    """Somebody who knows the token, and often what would be right to say.

    Args:
        chance: decides what is said.
        may_end_the_run: also hands in last rounds and asks that training ends, as whoever knows the token may.

    """

    def __init__(self, chance: random.Random, may_end_the_run: bool = False) -> None:
        self._random = chance
        self._may_end_the_run = may_end_the_run

    def conversation(self) -> list[Step]:
        """A worker's first words, up to some point, and others from there on."""
        chance = self._random
        greeting: list[Step] = [
            (1, [frames.HELLO + hello(layout_of(NUMEL), 0).encode(), bytes(frames.NONCE_BYTES)]),
            (2, [frames.BEAT + frames.Beat(0, "life-1", "00").encode()]),
            (1, [frames.pack_part(frames.CREDIT, 1, 1)]),
            (1, [frames.PUSH + push(1, 0, incarnation=INCARNATION).encode()]),
        ]
        return greeting[: chance.randint(0, 4)] + [self._step() for _ in range(chance.randint(0, 25))]

    def _step(self) -> Step:
        chance = self._random
        if chance.random() < 0.05:
            return chance.randint(1, 3), None
        if chance.random() < 0.05:
            return chance.randint(1, 3), [chance.randbytes(chance.randint(0, 80))]
        kind = chance.choice(_KINDS)
        connection = 2 if kind in (frames.BEAT, frames.ASK, frames.KNOCK) else 1
        if chance.random() < 0.05:
            connection = chance.randint(1, 3)
        if kind in _FORMS:
            head = kind + self._body(_FORMS[kind])
        elif kind == frames.BYE:
            head = kind
        else:
            head = frames.pack_part(kind, self._transfer(), self._transfer())
        rest = [bytes(frames.NONCE_BYTES)] if kind == frames.HELLO else []
        # Every length but that of the whole model.
        if kind == frames.DATA or chance.random() < 0.05:
            rest.append(chance.randbytes(chance.choice([0, 1, 4 * NUMEL - 1, 4 * NUMEL + 1, 100])))
        if chance.random() < 0.05:
            rest = rest[1:]
        return connection, [head, *rest]

    def _transfer(self) -> int:
        return self._random.choice([0, 0, 1, 1, 1, 2, 3, 2**32, 2**64 - 1])

    def _body(self, form: type[Message]) -> bytes:
        chance = self._random
        body = {name: self._right(name, str(field.type)) for name, field in form.__dataclass_fields__.items()}
        for _ in range(chance.choice([0, 0, 0, 1, 1, 2])):
            body[chance.choice(list(body))] = self._wrong()
        if chance.random() < 0.03:
            del body[chance.choice(list(body))]
        if not self._may_end_the_run:
            body.update({name: False for name in ("final", "stop") if name in body})
        data = json.dumps(body).encode()
        if chance.random() < 0.03:
            at = chance.randrange(len(data))
            data = data[:at] + chance.randbytes(3) + data[at + chance.randint(0, 5) :]
        return data

    def _right(self, name: str, kind: str) -> Any:
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

    def _wrong(self) -> Any:
        chance = self._random
        return chance.choice(
            [chance.choice(_NUMBERS), chance.choice(_TEXTS), None, True, [], float("nan"), float("inf"), -1.0, 1e308]
        )


class Target:
    """A server with a worker in good order, and the connections of somebody who is not."""

    def __init__(self) -> None:
        self.layout = layout_of(NUMEL)
        self.model = GlobalModel(self.layout, DelayedNesterov(), 1)
        self.coordinator = Coordinator(
            self.model, SpeedAwareSteps(5), GraceWindow(0.0), Budget(None), cohort=1, incarnation=INCARNATION
        )
        self.buffers = BufferPool(NUMEL, limit=2, most=4)
        self.server = Server(self.coordinator, self.buffers, threaded=False)
        self.way = Way()
        self._commands: deque[Callable[[], None]] = deque()
        self.hub = Hub(self.server, "the token", 30.0, self._commands.append)
        self._lives = 0

    def feed(self, connection: int, parts: Sequence[bytes]) -> None:
        """A message arrives over a connection."""
        name = b"%d" % connection
        self.way.socket.open.add(name)
        self.way.socket.inbox.append([name, *parts])
        self.turn()

    def turn(self) -> None:
        """What the wire's thread does in one turn."""
        self._run_commands()
        self.hub.note_ends(self.way)  # type: ignore[arg-type]
        while self.hub.receive(self.way):  # type: ignore[arg-type]
            self._run_commands()
        self.hub.forget_ended()
        self.hub.serve_waiting()
        self.hub.tick()

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def hang_up(self, connection: int) -> None:
        """A connection ends."""
        self.way.close(connection)
        self.turn()

    def said(self, connection: int, kind: bytes) -> list[bytes]:
        """The last message of that kind that went out over a connection."""
        return [parts for parts in self.way.socket.sent[b"%d" % connection] if parts[0][:1] == kind][-1]

    def check(self) -> None:
        """A worker in good order joins, is given data, pushes and leaves."""
        self._lives += 1
        session, bulk, heart = f"good-{self._lives}", 2 * self._lives + 1000, 2 * self._lives + 1001
        version = self.model.version
        self.feed(bulk, [frames.HELLO + hello(self.layout, 0, session).encode(), bytes(frames.NONCE_BYTES)])
        self.feed(heart, [frames.BEAT + frames.Beat(0, session, "00").encode()])
        assert self.said(heart, frames.ANSWER)
        # How long the others' data loader is, whoever asks first has said.
        request = dataclasses.replace(ask(1, 0, session), stream="good")
        self.feed(heart, [frames.ASK + request.encode()])
        lease = Lease.decode(self.said(heart, frames.LEASE)[0][1:])
        assert lease.refused is None
        reply = self._dispatched(bulk)
        assert reply.version == version
        header = dataclasses.replace(push(1, 0, session, INCARNATION), base_version=version)
        self.feed(bulk, [frames.PUSH + header.encode()])
        self.feed(bulk, [frames.pack_part(frames.DATA, 1, 0), torch.ones(NUMEL).numpy().tobytes()])
        reply = self._dispatched(bulk)
        assert (reply.sequence, reply.version, reply.refused) == (1, version + 1, None)
        self.feed(bulk, [frames.BYE])
        self.hang_up(heart)
        self.hang_up(bulk)
        self.way.socket.sent.clear()

    def _dispatched(self, connection: int) -> Reply:
        header, reply = self.said(connection, frames.REPLY)
        transfer = frames.unpack_transfer(header)
        assert self.said(connection, frames.MODEL)[0] == frames.pack_part(frames.MODEL, transfer, 0)
        self.feed(connection, [frames.pack_part(frames.CREDIT, transfer, 1)])
        return Reply.decode(reply)


def throw(chance: random.Random) -> None:
    """One conversation, and a look at what it has left."""
    target = Target()
    version = target.model.version
    for connection, parts in Speaker(chance).conversation():
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
