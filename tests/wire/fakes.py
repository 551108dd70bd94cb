"""A server without algorithms, for tests of the wire alone, and what it takes to talk to it."""

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

from lightning_async_localsgd.buffers import BufferLease, BufferPool
from lightning_async_localsgd.layout import Layout
from lightning_async_localsgd.messages import PROTOCOL_VERSION, Facts, Hello, Lease, LeaseRequest, Push, Reply
from lightning_async_localsgd.wire import Endpoints, Outlet, WireExchange, WireServer, frames
from lightning_async_localsgd.wire.auth import introduce
from tests.proxy import Proxy

PATIENCE = 60.0
"""Seconds after which something that should happen at once counts as never happening."""


def layout_of(numel: int, name: str = "weight") -> Layout:
    return Layout.from_description([[name, [numel], "torch.float32", "parameter"]])


def hello(layout: Layout, worker: int = 1, session: str = "life-1") -> Hello:
    return Hello(PROTOCOL_VERSION, worker, session, layout.fingerprint)


def push(sequence: int, worker: int = 1, session: str = "life-1", incarnation: str = "start-1", steps: int = 3) -> Push:
    return Push(worker, session, sequence, incarnation, 0, steps, 8 * steps, steps, 0.1, 0.0, False, False)


def wait_for(condition: Callable[[], object], what: str = "") -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"never happened: {what or condition}"
        time.sleep(0.005)


def ask(number: int, worker: int = 1, session: str = "life-1") -> LeaseRequest:
    return LeaseRequest(worker, session, number, "0", 100, 1, 0, False)


class FakeServer:
    """Subtracts every push from the model once, and answers at once unless told to hold its answers.

    The lease of request n is item n.
    """

    def __init__(self, numel: int, incarnation: str = "start-1", most: int = 8) -> None:
        self.incarnation = incarnation
        self.layout = layout_of(numel)
        self.buffers = BufferPool(numel, limit=2, most=most)
        self.wanted: dict[int, int] = {}
        self.model = torch.arange(numel, dtype=torch.float32)
        self.version = 0
        self.joined: list[Hello] = []
        self.pushed: list[tuple[Push, bool]] = []
        self.applied: dict[str, int] = {}
        self.departed: list[tuple[int, str, str]] = []
        self.revived: list[tuple[int, str]] = []
        self.introduced: list[int] = []
        self.asked: list[LeaseRequest] = []
        self.answering = threading.Event()
        self.answering.set()
        self.refusing: str | None = None
        self.outlets: dict[int, Outlet] = {}
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fake-server")
        self._thread.start()

    def join(self, hello: Hello, outlet: Outlet) -> None:
        self.joined.append(hello)
        self.outlets[hello.worker] = outlet
        if self.refusing is not None:
            outlet.refuse(self.refusing)
        elif not hello.rejoining:
            self._events.put(lambda: self.answer(0, None, outlet))

    def push(self, push: Push, lease: BufferLease | None, outlet: Outlet) -> None:
        def event() -> None:
            refused = None
            if push.incarnation != self.incarnation:
                refused = "another incarnation"
            elif push.sequence <= self.applied.get(push.session, 0):
                refused = "already applied"
            else:
                self.applied[push.session] = push.sequence
                if lease is not None:
                    self.model -= lease.tensor
                    self.version += 1
            self.answer(push.sequence, refused, outlet, lease)

        self.pushed.append((push, lease is not None))
        self._events.put(event)

    def lease(self, request: LeaseRequest, answer: Callable[[Lease], None]) -> None:
        def event() -> None:
            assert self.answering.wait(PATIENCE)
            answer(Lease(request.number, request.epoch, request.number, request.number + 1, None))

        self.asked.append(request)
        self._events.put(event)

    def introduce(self, worker: int, answer: Callable[[Facts], None]) -> None:
        self.introduced.append(worker)
        number = worker if worker >= 0 else 100 + len(self.introduced)
        facts = Facts(self.incarnation, "", number, 2, 7, 1, "the-run", "hash", refused=self.refusing)
        self._events.put(lambda: answer(facts))

    def lost(self, worker: int, session: str, reason: str) -> None:
        self.departed.append((worker, session, reason))

    def revive(self, worker: int, session: str) -> None:
        self.revived.append((worker, session))

    def close(self) -> None:
        self.answering.set()
        self._events.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            event()

    def answer(self, sequence: int, refused: str | None, outlet: Outlet, lease: BufferLease | None = None) -> None:
        """The model goes out in the buffer that the push came in; two of them are then enough for any number."""
        assert self.answering.wait(PATIENCE)
        until = time.monotonic() + PATIENCE
        while lease is None:
            lease = self.buffers.try_acquire()
            assert time.monotonic() < until
            time.sleep(0.001)
        lease.tensor.copy_(self.model)
        lease.touch()
        outlet.dispatch(Reply(self.incarnation, sequence, self.version, 0, 50, 0.0, 1.0, 0.0, False, refused), lease)


def sockets_of_ours() -> list[str]:
    """Names of the Unix sockets that this process listens on."""
    ours = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            ours.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [name for name, inode in listening().items() if f"socket:[{inode}]" in ours]


def listening() -> dict[str, str]:
    """All Unix sockets of runs on this machine that somebody listens on, with their inodes."""
    with open("/proc/net/unix") as file:
        lines = [line.split() for line in file if "@async_localsgd_" in line]
    return {line[-1]: line[6] for line in lines if line[3] == "00010000"}


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class Wire:
    """Starts servers and workers' ends, and closes them all."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def server(self, numel: int = 1000, **options: Any) -> tuple[FakeServer, WireServer]:
        most = options.pop("most", 8)
        fake = FakeServer(numel, options.pop("incarnation", "start-1"), most)
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

    def road(self, endpoints: Endpoints | None, record: bool = False) -> tuple[Proxy, Endpoints]:
        """A proxy in front of a server, and how to reach the server through it."""
        assert endpoints is not None
        proxy = self._stack.enter_context(Proxy(endpoints.address, record))
        return proxy, replace(endpoints, address=proxy.address)

    def raw(self, endpoints: Endpoints | None) -> RawWorker:
        worker = RawWorker(endpoints)
        self._stack.callback(worker.close)
        return worker


class RawWorker:
    """Knows the token but says what it likes; one connection."""

    def __init__(self, endpoints: Endpoints | None) -> None:
        assert endpoints is not None
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        introduce(self.socket, endpoints)
        self.socket.connect(endpoints.address)

    def say(self, *parts: bytes) -> None:
        assert self.socket.poll(int(1000 * PATIENCE), zmq.POLLOUT)
        self.socket.send_multipart(parts)

    def hear(self, kind: bytes) -> list[bytes]:
        """The next message of ``kind``; others are skipped."""
        while True:
            assert self.socket.poll(int(1000 * PATIENCE)), f"no {kind!r} came"
            parts = self.socket.recv_multipart()
            if parts[0][:1] == kind:
                return parts

    def answered(self) -> bool:
        """Whether the answer to a beat is among what has come."""
        while self.socket.poll(0):
            if self.socket.recv_multipart()[0][:1] == frames.ANSWER:
                return True
        return False

    def greet(self, layout: Layout, worker: int = 1, session: str = "life-1") -> None:
        self.say(frames.HELLO + hello(layout, worker, session).encode(), bytes(frames.NONCE_BYTES))
        self.hear(frames.WELCOME)

    def close(self) -> None:
        self.socket.close(0)
