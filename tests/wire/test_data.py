"""Data leases from end to end: the real server and its wire, workers that dial in, one that dies, roads that break."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.buffers import BufferPool
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.exchange import Exchange
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.layout import Binding, Layout
from lightning_async_localsgd.leases import LeaseDesk
from lightning_async_localsgd.local_exchange import LocalExchange
from lightning_async_localsgd.messages import Push
from lightning_async_localsgd.objections import Objection
from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.server import Server
from lightning_async_localsgd.wire import WireExchange, WireServer
from lightning_async_localsgd.worker import Worker
from tests.proxy import Proxy

EPOCHS = 3
ITEMS = 120


class Recorder(Coordinator):
    """Remembers which pushes it has applied: a worker whose answer was lost cannot tell."""

    applied: list[tuple[int, int]]

    def _apply(self, push: Push, *rest: Any) -> Objection | None:
        refused = super()._apply(push, *rest)
        if refused is None:
            self.applied.append((push.worker, push.sequence))
        return refused


class Rank:
    """What a rank does with its leases, without Lightning."""

    def __init__(self, number: int, exchange: Exchange) -> None:
        self.worker = Worker(number, Binding(LAYOUT, torch.nn.Linear(4, 3)), exchange)
        self.desk = LeaseDesk(exchange, number, self.worker.session)
        self.worker.used = self.desk.used
        self.stock = self.desk.stock("0", ITEMS, 1)
        self.rounds: list[list[tuple[int, int]]] = [[]]
        """Items of each push, the one that is to come included."""

    def train(self, most: int, seconds: float) -> None:
        """Trains on all epochs, or until it has taken ``most`` steps."""
        self.worker.join()
        epoch = 0
        while epoch < EPOCHS and self.worker.total_steps < most:
            item = self.stock.next(epoch)
            if item is None:
                epoch += 1
                continue
            self.rounds[-1].append(item)
            self.stock.mark_used(1)
            time.sleep(seconds)
            self.worker.count_step()
            self.worker.end_step(samples=1)
            self.worker.exchange.check()
            if self.worker.due:
                self.end_round()

    def finish(self) -> None:
        """What came back after this rank had seen the epochs' ends, too."""
        while (item := self.stock.next(EPOCHS - 1)) is not None:
            self.rounds[-1].append(item)
            self.stock.mark_used(1)
            self.worker.count_step()
            self.end_round()
        self.end_round(final=True)

    def end_round(self, final: bool = False) -> None:
        self.rounds.append([])
        self.worker.end_round(final=final)


LAYOUT = Layout.of(torch.nn.Linear(4, 3))


@pytest.mark.parametrize("breaks", [0, 8])
def test_every_item_is_in_one_applied_push_though_a_rank_dies_and_roads_break(breaks: int) -> None:
    coordinator = Recorder(
        GlobalModel(LAYOUT, DelayedNesterov(), 3), SpeedAwareSteps(7), GraceWindow(0.0), Budget(None), 3, "this"
    )
    coordinator.applied = []
    with contextlib.ExitStack() as stack:
        server = Server(coordinator, BufferPool(LAYOUT.numel, most=5))
        stack.callback(server.close)
        wire = WireServer(server, ipc=False, tcp=True, silence_timeout=30.0)
        stack.callback(wire.close)
        assert wire.endpoints is not None
        road = stack.enter_context(Proxy(wire.endpoints.address))
        endpoints = replace(wire.endpoints, address=road.address)
        distant = [WireExchange(endpoints, LAYOUT, silence_timeout=30.0, connect_timeout=30.0) for _ in range(2)]
        for exchange in distant:
            stack.callback(exchange.close)
        ranks = [Rank(number, exchange) for number, exchange in enumerate([LocalExchange(server), *distant])]
        done = threading.Event()

        def harm() -> None:
            for _ in range(breaks):
                if done.wait(0.05):
                    return
                road.break_()

        def die() -> None:
            ranks[2].train(40, 0.001)
            ranks[2].worker.exchange.close()

        with ThreadPoolExecutor(4) as pool:
            harming = pool.submit(harm)
            training = [pool.submit(ranks[0].train, 10**6, 0.001), pool.submit(ranks[1].train, 10**6, 0.003)]
            pool.submit(die).result(60)
            for each in training:
                each.result(60)
            done.set()
            harming.result(60)
            # A rank whose road broke after its last push is not counted on until it pushes again.
            for rank in ranks[:2]:
                rank.end_round()
            for each in [pool.submit(ranks[0].finish), pool.submit(ranks[1].finish)]:
                each.result(60)
        assert ranks[0].worker.stopped
        assert ranks[1].worker.stopped
        applied = Counter(
            item for worker, sequence in coordinator.applied for item in ranks[worker].rounds[sequence - 1]
        )
        assert applied == Counter({(epoch, item): 1 for epoch in range(EPOCHS) for item in range(ITEMS)})
        assert server.state_dict()["leases"]["0"]["free"] == []
        assert wire.rejected_messages == 0
