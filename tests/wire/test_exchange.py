"""What a worker and the server tell each other when all goes well, and when they decline each other politely."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.messages import PROTOCOL_VERSION, Hello
from lightning_async_localsgd.wire import Endpoints, WireExchange, WireServer
from lightning_async_localsgd.wire.frames import FRAME_BYTES, WINDOW
from tests.wire.fakes import (
    PATIENCE,
    FakeServer,
    Wire,
    ask,
    hello,
    layout_of,
    open_descriptors,
    push,
    wait_for,
)

Open = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
FRAME = FRAME_BYTES // 4


@pytest.mark.parametrize("numel", [1, FRAME, FRAME + 1, (2 * WINDOW + 3) * FRAME + 7])
def test_models_and_pseudo_gradients_cross_bit_for_bit(way: Open, wire: Wire, numel: int) -> None:
    fake, _, endpoints = way(numel)
    exchange = wire.worker(endpoints, fake)
    model = torch.full((numel,), -1.0)
    reply = exchange.join(hello(fake.layout), model)
    assert (reply.sequence, reply.version, reply.refused) == (0, 0, None)
    assert torch.equal(model, torch.arange(numel, dtype=torch.float32))
    expected = model.clone()
    for sequence in (1, 2, 3):
        gradient = torch.randn(numel)
        kept = gradient.clone()
        reply = exchange.push(push(sequence), gradient, model)
        expected -= kept
        assert (reply.sequence, reply.version) == (sequence, sequence)
        assert torch.equal(model, expected)
        assert torch.equal(gradient, kept)
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    assert fake.buffers.allocated <= 2


def test_a_push_without_steps_or_of_another_incarnation_is_not_uploaded(way: Open, wire: Wire) -> None:
    numel = 20 * FRAME
    fake, server, endpoints = way(numel)
    exchange = wire.worker(endpoints, fake)
    model, gradient = torch.zeros(numel), torch.ones(numel)
    exchange.join(hello(fake.layout), model)
    assert exchange.push(push(1, steps=0), gradient, model).refused is None
    assert exchange.push(push(2, incarnation="start-0"), gradient, model).refused == "another incarnation"
    assert [uploaded for _, uploaded in fake.pushed] == [False, False]
    assert server.bytes_received < 4 * numel
    assert torch.equal(model, torch.arange(numel, dtype=torch.float32))


def test_four_workers_at_once_share_two_buffers(way: Open, wire: Wire) -> None:
    numel, rounds = 3 * FRAME + 5, 5
    fake, _, endpoints = way(numel)

    def work(worker: int) -> float:
        exchange = wire.worker(endpoints, fake)
        model, gradient = torch.zeros(numel), torch.full((numel,), float(worker))
        exchange.join(hello(fake.layout, worker, f"life-{worker}"), model)
        for sequence in range(1, rounds + 1):
            reply = exchange.push(push(sequence, worker, f"life-{worker}"), gradient, model)
            assert reply.sequence == sequence
            assert reply.refused is None
        return float(model[0])

    with ThreadPoolExecutor(4) as pool:
        lowest = min(pool.map(work, (1, 2, 3, 4)))
    assert lowest == -rounds * (1 + 2 + 3 + 4)
    assert float(fake.model[0]) == lowest
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")


def test_both_ways_lead_to_the_same_server(wire: Wire) -> None:
    fake, server = wire.server(10, ipc=True, tcp=True, encrypt=True)
    model = torch.zeros(10)
    for worker, endpoints in ((1, server.local_endpoints), (2, server.endpoints)):
        exchange = wire.worker(endpoints, fake)
        exchange.join(hello(fake.layout, worker, f"life-{worker}"), model)
        exchange.push(push(1, worker, f"life-{worker}"), torch.ones(10), model)
    assert fake.version == 2
    assert server.local_endpoints is not None
    assert server.endpoints is not None
    assert (server.local_endpoints.encrypted, server.endpoints.encrypted) == (False, True)


def test_bytes_are_counted_alike_on_both_sides(way: Open, wire: Wire) -> None:
    numel = 5 * FRAME
    fake, server, endpoints = way(numel)
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout), model)
    exchange.push(push(1), torch.ones(numel), model)
    assert 4 * numel < exchange.bytes_sent < 4 * numel + 10_000
    assert 8 * numel < exchange.bytes_received < 8 * numel + 10_000
    exchange.close()
    wait_for(lambda: fake.departed, "the goodbye")
    # The goodbye itself, and perhaps a heartbeat, are not in both counts.
    assert abs(server.bytes_received - exchange.bytes_sent) < 1000
    assert abs(server.bytes_sent - exchange.bytes_received) < 1000


def test_the_wish_to_stop_travels_with_the_heartbeat(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    exchange.check()
    assert exchange.wanted_version == -1
    fake.wanted = {1: 3}
    wait_for(lambda: exchange.wanted_version == 3, "the wish arrives")
    exchange.check()


def test_a_goodbye_is_told_to_the_server_once(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    exchange.close()
    exchange.close()
    wait_for(lambda: fake.departed, "the goodbye")
    server.close()
    assert fake.departed == [(1, "life-1", "it said goodbye")]
    assert server.rejected_messages == 0


def test_another_model_is_refused_with_the_first_differences(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way()
    other = layout_of(1001, "bias")
    exchange = wire.worker(endpoints, fake, layout=other)
    with pytest.raises(ExchangeError, match=r"(?s)worker 1 is not that of rank 0.*parameter 0: .*1001.*here.*weight"):
        exchange.join(hello(other), torch.zeros(1001))
    assert not fake.joined
    assert server.rejected_messages == 1, "rank 0 counts it, too"


def test_another_protocol_version_is_refused_whatever_its_hello_looks_like(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way()
    exchange = wire.worker(endpoints, fake)
    with pytest.raises(ExchangeError, match=f"speaks protocol 99, the server {PROTOCOL_VERSION}.*install the same"):
        exchange.join(Hello(99, 1, "life-1", fake.layout.fingerprint), torch.zeros(1000))
    assert not fake.joined


def test_a_refusal_by_the_server_ends_join(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way()
    fake.refusing = "training is over"
    with pytest.raises(ExchangeError, match="training is over"):
        wire.worker(endpoints, fake).join(hello(fake.layout), torch.zeros(1000))


def test_a_refusal_by_the_server_ends_a_push_that_waits(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way()
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(1000)
    exchange.join(hello(fake.layout), model)
    fake.answering.clear()
    refuse = threading.Timer(0.1, lambda: fake.outlets[1].refuse("a newer session has taken its place"))
    refuse.start()
    with pytest.raises(ExchangeError, match="a newer session has taken its place"):
        exchange.push(push(1), torch.ones(1000), model)
    refuse.join()
    fake.answering.set()
    exchange.close()
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    assert not fake.departed


def test_a_refusal_by_the_server_is_noticed_between_two_pushes(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    fake.outlets[1].refuse("a newer session has taken its place")
    with pytest.raises(ExchangeError, match="a newer session has taken its place"):
        wait_for(lambda: exchange.check(), "the refusal arrives")


def test_a_model_on_its_way_arrives_before_the_server_closes(way: Open, wire: Wire) -> None:
    numel = 6 * WINDOW * FRAME
    fake, server, endpoints = way(numel)
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout), model)
    fake.answering.clear()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(exchange.push, push(1), torch.ones(numel), model)
        wait_for(lambda: fake.pushed, "the push arrives")
        model.zero_()
        fake.answering.set()
        wait_for(lambda: server.bytes_sent > 4 * numel + 2 * FRAME_BYTES, "the model starts")
        server.close()
        assert reply.result(PATIENCE).version == 1
    assert torch.equal(model, fake.model)


def test_a_used_outlet_frees_what_it_is_given_after_the_end(wire: Wire) -> None:
    fake, server = wire.server()
    exchange = wire.worker(server.local_endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    server.close()
    fake.answer(7, None, fake.outlets[1])
    fake.outlets[1].refuse("too late")
    assert fake.buffers.in_use == 0


def test_nothing_stays_open_after_many_runs(wire: Wire) -> None:
    def run() -> None:
        fake = FakeServer(10)
        server = WireServer(fake, ipc=True, tcp=True, silence_timeout=30.0)
        assert server.local_endpoints is not None
        exchange = WireExchange(server.local_endpoints, fake.layout, silence_timeout=30.0, connect_timeout=30.0)
        exchange.join(hello(fake.layout), torch.zeros(10))
        exchange.close()
        server.close()
        fake.close()

    run()
    before = open_descriptors()
    for _ in range(5):
        run()
    assert open_descriptors() <= before


def test_endpoints_travel_but_never_show_their_secrets(wire: Wire) -> None:
    _, server = wire.server(ipc=True, tcp=True, encrypt=True, token="a-secret-token")
    for endpoints in (server.local_endpoints, server.endpoints):
        assert endpoints is not None
        copy = pickle.loads(pickle.dumps(endpoints))
        assert copy == endpoints
        assert endpoints.address in repr(copy)
        for secret in (endpoints.token, endpoints.server_key, endpoints.public_key, endpoints.secret_key):
            assert secret is None or secret not in repr(copy)


def test_a_port_in_use_is_named_with_the_way_out(wire: Wire) -> None:
    _, first = wire.server(ipc=False, tcp=True)
    assert first.endpoints is not None
    port = int(first.endpoints.address.rpartition(":")[2])
    with pytest.raises(RuntimeError, match=rf"exchange.port={port} is in use.*exchange.port=0"):
        wire.server(ipc=False, tcp=True, port=port)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "ipc://@async_localsgd_nobody", "tcp://no.such.host.invalid:9"]
)
def test_a_server_that_cannot_be_reached_is_named_with_the_wait(wire: Wire, address: str) -> None:
    fake, server = wire.server()
    assert server.local_endpoints is not None
    nowhere = Endpoints(address, "start-1", server.local_endpoints.token)
    exchange = wire.worker(nowhere, fake, connect_timeout=0.5)
    with pytest.raises(ExchangeError, match=f"{address} could not be reached within 0.5 s: .*exchange.port"):
        exchange.join(hello(fake.layout), torch.zeros(1000))


def test_options_that_make_no_sense_are_named(wire: Wire) -> None:
    fake, server = wire.server()
    with pytest.raises(ValueError, match="silence_timeout=0 must be a positive"):
        WireServer(fake, silence_timeout=0)
    with pytest.raises(ValueError, match="ipc=False and tcp=False"):
        WireServer(fake, ipc=False, silence_timeout=1.0)
    with pytest.raises(ValueError, match="connect_timeout=-1 must be a positive"):
        wire.worker(server.local_endpoints, fake, connect_timeout=-1)
    exchange = wire.worker(server.local_endpoints, fake)
    with pytest.raises(ValueError, match="999 elements, the layout 1000"):
        exchange.join(hello(fake.layout), torch.zeros(999))


def test_leases_are_asked_for_without_waiting_and_taken_in_any_order(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    fake.answering.clear()
    for number in (1, 2, 3):
        exchange.request_lease(ask(number))
    wait_for(lambda: len(fake.asked) == 3, "the requests arrive")
    fake.answering.set()
    assert [exchange.take_lease(number).start for number in (2, 3, 1)] == [2, 3, 1]
    assert fake.asked == [ask(1), ask(2), ask(3)]
    assert server.rejected_messages == 0


def test_a_lease_does_not_wait_for_the_model_that_is_on_its_way(way: Open, wire: Wire) -> None:
    numel = 4 * WINDOW * FRAME
    fake, server, endpoints = way(numel)
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(numel))
    # Another connection of the same worker that takes nothing of what is sent to it.
    raw = wire.raw(endpoints)
    raw.greet(fake.layout, 2, "life-2")
    wait_for(lambda: server.bytes_sent > 4 * numel + WINDOW * FRAME_BYTES, "a window of the model is sent")
    exchange.request_lease(ask(1))
    assert exchange.take_lease(1).start == 1


def test_a_lease_comes_after_joining_and_before_closing(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way()
    exchange = wire.worker(endpoints, fake)
    with pytest.raises(ExchangeError, match="comes after join"):
        exchange.request_lease(ask(1))
    exchange.join(hello(fake.layout), torch.zeros(1000))
    fake.answering.clear()
    exchange.request_lease(ask(1))
    exchange.close()
    with pytest.raises(ExchangeError, match="is closed"):
        exchange.take_lease(1)
    with pytest.raises(ExchangeError, match="is closed"):
        exchange.request_lease(ask(2))
