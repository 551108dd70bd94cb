"""What the processes of the tests run; each reports over a pipe and does what it is told over it."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection

import torch

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.wire import Endpoints, WireExchange, WireServer
from tests.wire.fakes import FakeServer, hello, layout_of, push


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
