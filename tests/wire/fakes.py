"""A server without algorithms for tests of the wire alone, and helpers to connect to it."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import zmq

from lightning_async_localsgd.protocol.buffers import BufferPool, PooledBuffer
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.messages import (
    PROTOCOL_VERSION,
    Hello,
    JoinInfo,
    Lease,
    LeaseRequest,
    MessageError,
    Push,
    Reply,
    Share,
)
from lightning_async_localsgd.wire import Endpoints, ReplyChannel, WireExchange, WireServer, frames
from lightning_async_localsgd.wire.auth import set_credentials
from tests.proxy import Proxy

PATIENCE = 60.0
"""Seconds after which an event that should happen at once counts as failed."""


def layout_of(numel: int, name: str = "weight") -> Layout:
    return Layout.from_description([[name, [numel], "torch.float32", "parameter"]])


def hello(layout: Layout, worker: int = 1, session: str = "life-1") -> Hello:
    return Hello(PROTOCOL_VERSION, worker, session, layout.fingerprint)


def push(sequence: int, worker: int = 1, session: str = "life-1", incarnation: str = "start-1", steps: int = 3) -> Push:
    return Push(worker, session, sequence, incarnation, 0, steps, 8 * steps, steps, 0.1, 0.0, False, False)


def wait_for(condition: Callable[[], object], what: str = "") -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"did not happen: {what or condition}"
        time.sleep(0.005)


REPLY = Reply("start-1", 0, 0, 0, 0, 0.0, 1.0, 0.0, False, None)
"""Answers a share."""


def lease_request(number: int, worker: int = 1, session: str = "life-1") -> LeaseRequest:
    return LeaseRequest(worker, session, number, "0", 100, 1, 0, False)


class FakeServer:
    """Subtracts every push from the model once. Answers at once while :attr:`answering` is set.

    The lease of request n is item n.
    """

    def __init__(self, numel: int, incarnation: str = "start-1", max_total: int = 8) -> None:
        self.incarnation = incarnation
        self.layout = layout_of(numel)
        self.buffers = BufferPool(numel, max_active=2, max_total=max_total)
        self.shares: dict[int, BufferPool] = {}
        self.recalled: dict[int, int] = {}
        self.model = torch.arange(numel, dtype=torch.float32)
        self.version = 0
        self.joined: list[Hello] = []
        self.pushed: list[tuple[Push, bool]] = []
        self.applied: dict[str, int] = {}
        self.lost_sessions: list[tuple[int, str, str]] = []
        self.revived: list[tuple[int, str]] = []
        self.join_requests: list[int] = []
        self.status, self.status_requests = '{"progress": 3}', 0
        self.lease_requests: list[LeaseRequest] = []
        self.answering = threading.Event()
        self.answering.set()
        self.refusal: str | None = None
        self.channels: dict[int, ReplyChannel] = {}
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fake-server")
        self._thread.start()

    def join(self, hello: Hello, channel: ReplyChannel) -> None:
        self.joined.append(hello)
        self.channels[hello.worker] = channel
        if self.refusal is not None:
            channel.refuse(self.refusal)
        elif not hello.reconnecting:
            self._events.put(lambda: self.answer(0, None, channel))

    def push_buffers(self, push: Push) -> BufferPool:
        return self.buffers

    def push(self, push: Push, buffer: PooledBuffer | None, channel: ReplyChannel) -> None:
        def event() -> None:
            refused = None
            if push.incarnation != self.incarnation:
                refused = "another incarnation"
            elif push.sequence <= self.applied.get(push.session, 0):
                refused = "already applied"
            else:
                self.applied[push.session] = push.sequence
                if buffer is not None:
                    self.model -= buffer.tensor
                    self.version += 1
            self.answer(push.sequence, refused, channel, buffer)

        self.pushed.append((push, buffer is not None))
        self._events.put(event)

    def share_buffers(self, share: Share) -> BufferPool:
        if not share.parameters.isdecimal():
            raise MessageError("no such parameter")
        return self.shares.setdefault(int(share.parameters), BufferPool(int(share.parameters)))

    def share(self, share: Share, buffer: PooledBuffer, channel: ReplyChannel) -> None:
        """Double the values. The name of the parameter is the number of its elements."""

        def event() -> None:
            buffer.tensor.mul_(2.0)
            buffer.restart()
            channel.dispatch(replace(REPLY, sequence=share.sequence, shared=share.parameters), buffer)

        buffer.mark_complete()
        self._events.put(event)

    def request_lease(self, request: LeaseRequest, answer: Callable[[Lease], None]) -> None:
        def event() -> None:
            assert self.answering.wait(PATIENCE)
            answer(Lease(request.number, request.epoch, request.number, request.number + 1, None))

        self.lease_requests.append(request)
        self._events.put(event)

    def request_join_info(self, worker: int, answer: Callable[[JoinInfo], None]) -> None:
        self.join_requests.append(worker)
        number = worker if worker >= 0 else 100 + len(self.join_requests)
        info = JoinInfo(2, 7, 1, "the-run", "hash", incarnation=self.incarnation, worker=number, refused=self.refusal)
        self._events.put(lambda: answer(info))

    def request_status(self, answer: Callable[[str], None]) -> None:
        self.status_requests += 1
        self._events.put(lambda: answer(self.status))

    def lost(self, worker: int, session: str, reason: str) -> None:
        self.lost_sessions.append((worker, session, reason))

    def revive(self, worker: int, session: str) -> None:
        self.revived.append((worker, session))

    def close(self) -> None:
        self.answering.set()
        self._events.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            event()

    def answer(
        self, sequence: int, refused: str | None, channel: ReplyChannel, buffer: PooledBuffer | None = None
    ) -> None:
        """Send the model in the buffer that the push came in. Two buffers are then enough for any number of workers."""
        assert self.answering.wait(PATIENCE)
        until = time.monotonic() + PATIENCE
        while buffer is None:
            buffer = self.buffers.try_acquire()
            assert time.monotonic() < until
            time.sleep(0.001)
        buffer.tensor.copy_(self.model)
        buffer.record_progress()
        channel.dispatch(Reply(self.incarnation, sequence, self.version, 0, 50, 0.0, 1.0, 0.0, False, refused), buffer)


def sockets_of_ours() -> list[str]:
    """Return the names of the Unix sockets that this process listens on."""
    ours = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            ours.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [name for name, inode in listening().items() if f"socket:[{inode}]" in ours]


def listening() -> dict[str, str]:
    """Return the listening Unix sockets of all runs on this machine, with their inodes."""
    with open("/proc/net/unix") as file:
        lines = [line.split() for line in file if "@async_localsgd_" in line]
    return {line[-1]: line[6] for line in lines if line[3] == "00010000"}


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class WireHarness:
    """Opens servers and exchanges, and closes them all at the end of a test."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def server(self, numel: int = 1000, **options: Any) -> tuple[FakeServer, WireServer]:
        max_total = options.pop("max_total", 8)
        fake = FakeServer(numel, options.pop("incarnation", "start-1"), max_total)
        self._stack.callback(fake.close)
        server = WireServer(fake, **{"silence_timeout": 30.0, **options})
        self._stack.callback(server.close)
        return fake, server

    def worker(self, endpoints: Endpoints | None, fake: FakeServer, **options: Any) -> WireExchange:
        assert endpoints is not None
        layout = options.pop("layout", fake.layout)
        exchange = WireExchange(endpoints, layout, **{"silence_timeout": 30.0, "connect_timeout": 30.0, **options})
        self._stack.callback(exchange.close)
        return exchange

    def proxy(self, endpoints: Endpoints | None, record: bool = False) -> tuple[Proxy, Endpoints]:
        """Open a proxy in front of a server. Return it and the endpoints to reach the server through it."""
        assert endpoints is not None
        proxy = self._stack.enter_context(Proxy(endpoints.address, record))
        return proxy, replace(endpoints, address=proxy.address)

    def raw(self, endpoints: Endpoints | None) -> RawWorker:
        worker = RawWorker(endpoints)
        self._stack.callback(worker.close)
        return worker


class RawWorker:
    """One connection of a peer that knows the token and may send anything."""

    def __init__(self, endpoints: Endpoints | None) -> None:
        assert endpoints is not None
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        set_credentials(self.socket, endpoints)
        self.socket.connect(endpoints.address)

    def send(self, *parts: bytes) -> None:
        assert self.socket.poll(int(1000 * PATIENCE), zmq.POLLOUT)
        self.socket.send_multipart(parts)

    def receive(self, kind: bytes) -> list[bytes]:
        """Return the next message of ``kind``, and skip other messages."""
        while True:
            assert self.socket.poll(int(1000 * PATIENCE)), f"no {kind!r} arrived"
            parts = self.socket.recv_multipart()
            if parts[0][:1] == kind:
                return parts

    def has_pong(self) -> bool:
        """Return whether a pong is among the messages that have arrived."""
        while self.socket.poll(0):
            if self.socket.recv_multipart()[0][:1] == frames.PONG:
                return True
        return False

    def say_hello(self, layout: Layout, worker: int = 1, session: str = "life-1") -> None:
        self.send(frames.HELLO + hello(layout, worker, session).encode(), bytes(frames.NONCE_BYTES))
        self.receive(frames.WELCOME)

    def close(self) -> None:
        self.socket.close(0)
