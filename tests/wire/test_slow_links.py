"""Slow links: a transfer that moves never times out, and pings are answered during transfers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_async_localsgd.wire import frames
from tests.wire.fakes import PATIENCE, WireHarness, hello, lease_request, push, wait_for

FRAME = frames.FRAME_BYTES // 4


@pytest.mark.parametrize("encrypt", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "curve"])
def test_transfer_may_take_much_longer_than_the_silence_timeout(wire: WireHarness, encrypt: bool) -> None:
    # More than the window. At this rate the window alone takes longer than the silence timeout.
    numel = 20 * FRAME
    fake, server = wire.server(numel, ipc=False, tcp=True, encrypt=encrypt, silence_timeout=1.0)
    proxy, endpoints = wire.proxy(server.endpoints)
    proxy.throttle(14e6)
    proxy.delay(0.1)
    exchange = wire.worker(endpoints, fake, silence_timeout=1.0)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout), model)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        received = server.bytes_received
        pushing = pool.submit(exchange.push, push(1), torch.ones(numel), model)
        wait_for(lambda: server.bytes_received > received + 2 * frames.FRAME_BYTES, "the upload is halfway")
        # Both use the heartbeat's connection, during the upload.
        assert exchange.request_lease(lease_request(1)).result(PATIENCE).start == 1
        assert not fake.pushed, "the lease did not wait for the upload"
        fake.recalled = {1: 0}
        wait_for(lambda: exchange.recalled_version == 0, "the recall arrives")
        reply = pushing.result(PATIENCE)
    assert time.monotonic() - began > 2.5
    assert (reply.version, reply.refused) == (1, None)
    assert torch.equal(model, fake.model)
    exchange.check()
    assert not fake.lost_sessions
    assert len(fake.joined) == 1, "the worker never reconnects"
    assert proxy.connections == 2


@pytest.mark.slow
def test_two_workers_share_a_link_of_ten_megabits_and_300_ms(wire: WireHarness) -> None:
    numel = 2 * FRAME
    fake, server = wire.server(numel, ipc=False, tcp=True, silence_timeout=3.0)
    proxy, endpoints = wire.proxy(server.endpoints)
    proxy.throttle(10e6 / 8)
    proxy.delay(0.3)
    # Both workers share the link.
    workers = [wire.worker(endpoints, fake, silence_timeout=3.0) for _ in range(2)]
    models = [torch.zeros(numel) for _ in workers]

    def work(number: int) -> None:
        session = f"life-{number}"
        workers[number].join(hello(fake.layout, number, session), models[number])
        workers[number].push(push(1, number, session), torch.ones(numel), models[number])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert fake.version == 2
    assert not fake.lost_sessions
    assert proxy.connections == 4
