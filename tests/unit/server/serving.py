"""A server whose workers are threads or recorded channels, for the tests of the server."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

import torch

from lightning_async_localsgd.outer import DelayedNesterov, OuterOptimizer
from lightning_async_localsgd.protocol.buffers import BufferPool, PooledBuffer
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.messages import JoinInfo, Push, Reply
from lightning_async_localsgd.server.merge_policy import MergePolicy
from lightning_async_localsgd.server.observers import RunObserver
from lightning_async_localsgd.server.server import Server
from tests.harness import hello, make_coordinator


def make_server(
    workers: int,
    total: int | None,
    threaded: bool = True,
    outer_optimizer: OuterOptimizer | None = None,
    quorum: int | Literal["all"] = 1,
    observers: Sequence[RunObserver] = (),
) -> Server:
    module = torch.nn.Linear(4, 3)
    layout = Layout.of(module)
    coordinator = make_coordinator(
        workers,
        outer_optimizer,
        policy=MergePolicy(quorum),
        total=total,
        grace="auto",
        local_steps=5,
        layout=layout,
    )
    Binding(layout, module).read(coordinator.model.theta)
    return Server(coordinator, BufferPool(layout.numel), threaded=threaded, observers=observers)


class BrokenOptimizer(DelayedNesterov):
    def step(self, gradient: torch.Tensor, views: object) -> None:
        gradient.neg_()
        raise RuntimeError("the outer optimizer broke")


class RecordingChannel:
    """Keeps what a worker at the other end of the channel would receive."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.leases: list[PooledBuffer] = []
        self.refusals: list[str] = []
        self.answered = threading.Event()

    def dispatch(self, reply: Reply, lease: PooledBuffer) -> None:
        self.replies.append(reply)
        self.leases.append(lease)
        self.answered.set()

    def refuse(self, reason: str) -> None:
        self.refusals.append(reason)
        self.answered.set()


def push_of(worker: int, sequence: int, version: int, session: str | None = None) -> Push:
    return Push(worker, session or f"s{worker}", sequence, "this", version, 5, 5, 0, 0.0, 0.0, False, False)


def push_and_wait(server: Server, push: Push, channel: RecordingChannel, value: float = 1.0) -> None:
    """Push with a buffer of the pool, as the wire does, and wait for the reply."""
    channel.answered.clear()
    lease = server._traffic.uploads.try_acquire()
    assert lease is not None
    lease.tensor.fill_(value)
    server.push(push, lease, channel)
    assert channel.answered.wait(10)
    for answer in channel.leases:
        answer.release()
    channel.leases.clear()


def join_all(server: Server, workers: int) -> list[RecordingChannel]:
    channels = [RecordingChannel() for _ in range(workers)]
    for number, channel in enumerate(channels):
        server.join(hello(number, f"s{number}", server.layout), channel)
    for channel in channels:
        assert channel.answered.wait(10)
        channel.leases.pop().release()
    return channels


def request_join_info(server: Server, worker: int) -> JoinInfo:
    infos: list[JoinInfo] = []
    server.request_join_info(worker, infos.append)
    _ = server.live
    return infos[0]


def filled(server: Server) -> PooledBuffer:
    lease = None
    while lease is None:
        lease = server._traffic.uploads.try_acquire()
    lease.tensor.fill_(1.0)
    return lease
