"""What the processes of the tests run; each reports over a pipe and does what it is told over it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.wire import Endpoints, WireExchange, WireServer
from tests.wire.fakes import PATIENCE, FakeServer, hello, layout_of, push


class Program:
    """A process of the test's own, ended with it whatever happens."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def hears(self) -> Any:
        assert self.pipe.poll(PATIENCE), "the process says nothing"
        return self.pipe.recv()

    def told(self, word: str) -> Any:
        self.pipe.send(word)
        return self.hears()

    def killed(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.join(PATIENCE)
        assert self.process.exitcode == -signal.SIGKILL


Start = Callable[..., Program]


def worker(pipe: Connection, endpoints: Endpoints, numel: int, number: int, silence_timeout: float) -> None:
    """Joins, then pushes once for every "push" it reads, checks for every "check", and ends on "end"."""
    torch.set_num_threads(1)
    layout = layout_of(numel)
    exchange = WireExchange(endpoints, layout, silence_timeout=silence_timeout, connect_timeout=30.0)
    model, gradient = torch.zeros(numel), torch.ones(numel)
    session = f"life-{number}"
    sequence = 0
    try:
        exchange.join(hello(layout, number, session), model)
        pipe.send("joined")
        while (word := pipe.recv()) != "end":
            if word == "check":
                exchange.check()
                pipe.send("fine")
            else:
                sequence += 1
                pipe.send(f"pushing {sequence}")
                reply = exchange.push(push(sequence, number, session), gradient, model)
                pipe.send(f"pushed {sequence} {reply.version} {reply.refused}")
    except ExchangeError as error:
        pipe.send(f"error {error}")
    finally:
        exchange.close()


def server(pipe: Connection, numel: int) -> None:
    """Serves until it reads a word; "drop answers" makes it hold them."""
    fake = FakeServer(numel)
    wire = WireServer(fake, ipc=True, tcp=True, silence_timeout=30.0)
    pipe.send((wire.local_endpoints, wire.endpoints))
    if pipe.recv() == "hold":
        fake.answering.clear()
        pipe.send("holding")
        pipe.recv()
    fake.answering.set()
    wire.close()
    fake.close()
    assert threading.active_count() == 1
