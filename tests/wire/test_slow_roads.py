"""Thin and long roads: a transfer that moves is never given up, and beats get through beside it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_async_localsgd.wire import frames
from tests.wire.fakes import PATIENCE, Wire, ask, hello, push, wait_for

FRAME = frames.FRAME_BYTES // 4


@pytest.mark.parametrize("encrypt", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "curve"])
def test_a_transfer_that_takes_far_longer_than_the_allowed_silence_is_not_given_up(wire: Wire, encrypt: bool) -> None:
    # More than the window, which at this rate alone takes longer to pass than anybody may be silent.
    numel = 20 * FRAME
    fake, server = wire.server(numel, ipc=False, tcp=True, encrypt=encrypt, silence_timeout=1.0)
    road, endpoints = wire.road(server.endpoints)
    road.throttle(14e6)
    road.delay(0.1)
    exchange = wire.worker(endpoints, fake, silence_timeout=1.0)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout), model)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        received = server.bytes_received
        pushing = pool.submit(exchange.push, push(1), torch.ones(numel), model)
        wait_for(lambda: server.bytes_received > received + 2 * frames.FRAME_BYTES, "it is in the middle")
        # Both go over the heartbeat's connection, in the middle of the upload.
        exchange.request_lease(ask(1))
        assert exchange.take_lease(1).start == 1
        assert not fake.pushed, "the lease did not wait for the upload"
        fake.wanted = {1: 0}
        wait_for(lambda: exchange.wanted_version == 0, "the wish arrives")
        reply = pushing.result(PATIENCE)
    assert time.monotonic() - began > 2.5
    assert (reply.version, reply.refused) == (1, None)
    assert torch.equal(model, fake.model)
    exchange.check()
    assert not fake.departed
    assert len(fake.joined) == 1, "over one connection"
    assert road.connections == 2


@pytest.mark.slow
def test_ten_megabits_and_three_hundred_milliseconds(wire: Wire) -> None:
    numel = 2 * FRAME
    fake, server = wire.server(numel, ipc=False, tcp=True, silence_timeout=3.0)
    road, endpoints = wire.road(server.endpoints)
    road.throttle(10e6 / 8)
    road.delay(0.3)
    # Two workers behind the same link.
    workers = [wire.worker(endpoints, fake, silence_timeout=3.0) for _ in range(2)]
    models = [torch.zeros(numel) for _ in workers]

    def work(number: int) -> None:
        session = f"life-{number}"
        workers[number].join(hello(fake.layout, number, session), models[number])
        workers[number].push(push(1, number, session), torch.ones(numel), models[number])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert fake.version == 2
    assert not fake.departed
    assert road.connections == 4
