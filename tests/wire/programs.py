"""Programs that tests run in other processes. Each is controlled over a pipe, and reports over it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.wire import Endpoints, WireExchange, WireServer
from tests.wire.fakes import PATIENCE, FakeServer, hello, layout_of, push


class Program:
    """A process that a test has started. It is ended with the test."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def receive(self) -> Any:
        assert self.pipe.poll(PATIENCE), "the process sends nothing"
        return self.pipe.recv()

    def request(self, word: str) -> Any:
        self.pipe.send(word)
        return self.receive()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.join(PATIENCE)
        assert self.process.exitcode == -signal.SIGKILL


Start = Callable[..., Program]


def worker(pipe: Connection, endpoints: Endpoints, numel: int, number: int, silence_timeout: float) -> None:
    """Join. Then push for every "push" that arrives, check for every "check", and end on "end"."""
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
    """Serve until a command arrives. On "hold", stop answering and wait for another command."""
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
