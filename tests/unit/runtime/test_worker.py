"""Workers in the synchronous beginning, which exchange their gradients with a real server in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.runtime.live import LiveRuntime
from lightning_async_localsgd.runtime.local_exchange import LocalExchange
from lightning_async_localsgd.runtime.worker import Worker
from lightning_async_localsgd.server.server import Server
from tests.harness import make_coordinator

STEPS = 2


def one() -> nn.Linear:
    """Return a module with one weight, which is 1."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    return module


class Begun:
    """Workers that have joined a run with a synchronous beginning, each in a thread of its own.

    Args:
        workers: number of workers.

    """

    def __init__(self, workers: int) -> None:
        self.modules = [one() for _ in range(workers)]
        layout = Layout.of(self.modules[0])
        coordinator = make_coordinator(workers, layout=layout, total=60, beginning=STEPS, dynamic=False)
        coordinator.model.read(Binding(layout, self.modules[0]))
        self.server = Server(coordinator, BufferPool(layout.numel))
        self.workers = [
            Worker(number, Binding(layout, module), LocalExchange(self.server))
            for number, module in enumerate(self.modules)
        ]
        self.threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> Begun:
        self.call(lambda number: self.workers[number].join())
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.threads.shutdown()

    def call(self, function: Callable[[int], Any]) -> list[Any]:
        """Call a function with the number of each worker, all at the same time."""
        calls = [self.threads.submit(function, number) for number in range(len(self.workers))]
        return [call.result(timeout=20.0) for call in calls]

    def accumulate(self, number: int) -> None:
        """Let a worker compute the gradient of a local step."""
        worker, weight = self.workers[number], self.modules[number].weight
        assert worker.synchronous
        weight.grad = torch.full_like(weight, number + 1.0)
        worker.count_step()
        worker.end_step(samples=1)

    def step(self, number: int) -> float:
        """Let a worker take a step, and return its weight."""
        weight = self.modules[number].weight
        self.accumulate(number)
        assert self.workers[number].average_gradients(1.0).averaged
        weight.data -= 0.25 * weight.grad
        return self.weight(number)

    def weight(self, number: int) -> float:
        return float(self.modules[number].weight.detach())


class RuntimeOf(LiveRuntime):
    """A runtime of which a test needs only what it does with its worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._left = False


@pytest.mark.parametrize("broken", [set(), {0}, {0, 1}])
def test_another_worker_hands_in_its_weights_if_those_of_the_first_are_broken(broken: set[int]) -> None:
    with Begun(3) as run:
        assert run.call(run.step) == [0.5] * 3, "the mean gradient is 2"
        assert run.call(run.step) == [0.0] * 3
        for number in broken:
            run.modules[number].weight.data.fill_(math.nan)
        run.call(lambda number: run.workers[number].end_round())
        assert not any(worker.synchronous for worker in run.workers)
        assert [run.weight(number) for number in range(3)] == [0.0] * 3


def test_worker_that_leaves_within_a_synchronous_step_pushes_nothing() -> None:
    with Begun(2) as run:
        run.call(run.accumulate)
        runtime = RuntimeOf(run.workers[1])
        run.threads.submit(runtime.leave).result(timeout=20.0)
        assert runtime.stopped
        assert run.weight(1) == 1.0
        assert run.server.snapshot.refused_pushes == 0
