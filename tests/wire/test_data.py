"""Data leases end to end: the real server and wire, with a worker that dies and connections that break."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.runtime.leases import LeaseClient
from lightning_async_localsgd.runtime.local_exchange import LocalExchange
from lightning_async_localsgd.runtime.worker import Worker
from lightning_async_localsgd.server.server import Server
from lightning_async_localsgd.wire import WireExchange, WireServer
from tests.harness import make_coordinator
from tests.observing import RecordingObserver
from tests.proxy import Proxy

EPOCHS = 3
ITEMS = 120


class Rank:
    """Trains on its leases, without Lightning."""

    def __init__(self, number: int, exchange: LocalExchange | WireExchange) -> None:
        self.worker = Worker(number, Binding(LAYOUT, torch.nn.Linear(4, 3)), exchange)
        self.leases = LeaseClient(exchange, number, self.worker.session)
        self.worker.items_used = self.leases.items_used
        self.buffer = self.leases.buffer("0", ITEMS, 1)
        self.rounds: list[list[tuple[int, int]]] = [[]]
        """Items of each push, the next one included."""

    def train(self, max_steps: int, seconds: float) -> None:
        """Train on all epochs, or until ``max_steps`` steps are taken."""
        self.worker.join()
        epoch = 0
        while epoch < EPOCHS and self.worker.total_steps < max_steps:
            item = self.buffer.next(epoch)
            if item is None:
                epoch += 1
                continue
            self.rounds[-1].append(item)
            self.buffer.mark_used(1)
            time.sleep(seconds)
            self.worker.count_step()
            self.worker.end_step(samples=1)
            self.worker.exchange.check()
            if self.worker.due:
                self.end_round()

    def finish(self) -> None:
        """Train on the items that were returned after this rank had seen the end of the epochs."""
        while (item := self.buffer.next(EPOCHS - 1)) is not None:
            self.rounds[-1].append(item)
            self.buffer.mark_used(1)
            self.worker.count_step()
            self.end_round()
        self.end_round(final=True)

    def end_round(self, final: bool = False) -> None:
        self.rounds.append([])
        self.worker.end_round(final=final)


LAYOUT = Layout.of(torch.nn.Linear(4, 3))


@pytest.mark.parametrize("breaks", [0, 8])
def test_every_item_is_in_one_applied_push_when_a_rank_dies_and_connections_break(breaks: int) -> None:
    coordinator = make_coordinator(3, total=None, local_steps=7, layout=LAYOUT)
    recorder = RecordingObserver()
    with contextlib.ExitStack() as stack:
        server = Server(coordinator, BufferPool(LAYOUT.numel, max_total=5), observers=[recorder])
        stack.callback(server.close)
        wire = WireServer(server, ipc=False, tcp=True, silence_timeout=30.0)
        stack.callback(wire.close)
        assert wire.endpoints is not None
        proxy = stack.enter_context(Proxy(wire.endpoints.address))
        endpoints = replace(wire.endpoints, address=proxy.address)
        distant = [WireExchange(endpoints, LAYOUT, silence_timeout=30.0, connect_timeout=30.0) for _ in range(2)]
        for exchange in distant:
            stack.callback(exchange.close)
        ranks = [Rank(number, exchange) for number, exchange in enumerate([LocalExchange(server), *distant])]
        done = threading.Event()

        def break_connections() -> None:
            for _ in range(breaks):
                if done.wait(0.05):
                    return
                proxy.break_()

        def die() -> None:
            ranks[2].train(40, 0.001)
            ranks[2].worker.exchange.close()

        with ThreadPoolExecutor(4) as pool:
            breaking = pool.submit(break_connections)
            training = [pool.submit(ranks[0].train, 10**6, 0.001), pool.submit(ranks[1].train, 10**6, 0.003)]
            pool.submit(die).result(60)
            for each in training:
                each.result(60)
            done.set()
            breaking.result(60)
            # A rank whose connection broke after its last push is not waited for until it pushes again.
            for rank in ranks[:2]:
                rank.end_round()
            for each in [pool.submit(ranks[0].finish), pool.submit(ranks[1].finish)]:
                each.result(60)
        assert ranks[0].worker.stopped
        assert ranks[1].worker.stopped
        applied = Counter(
            item
            for push in recorder.pushes
            if push.refused is None
            for item in ranks[push.worker].rounds[push.sequence - 1]
        )
        assert applied == Counter({(epoch, item): 1 for epoch in range(EPOCHS) for item in range(ITEMS)})
        assert server.state_dict()["leases"]["0"]["free"] == []
        assert wire.rejected_messages == 0
