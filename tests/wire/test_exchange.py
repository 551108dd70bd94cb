"""Exchanges of a worker with the server when nothing fails, and refusals."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, Hello, Share
from lightning_async_localsgd.wire import Endpoints, WireExchange, WireServer
from lightning_async_localsgd.wire.frames import FRAME_BYTES, MAX_REASON_BYTES, WINDOW
from tests.wire.fakes import (
    PATIENCE,
    FakeServer,
    WireHarness,
    hello,
    layout_of,
    lease_request,
    open_descriptors,
    push,
    wait_for,
)

OpenWire = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
FRAME = FRAME_BYTES // 4


@pytest.mark.parametrize("numel", [1, FRAME, FRAME + 1, (2 * WINDOW + 3) * FRAME + 7])
def test_models_and_pseudo_gradients_arrive_bit_for_bit(open_wire: OpenWire, wire: WireHarness, numel: int) -> None:
    fake, _, endpoints = open_wire(numel)
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


def test_push_without_steps_or_of_another_incarnation_is_not_uploaded(open_wire: OpenWire, wire: WireHarness) -> None:
    numel = 20 * FRAME
    fake, server, endpoints = open_wire(numel)
    exchange = wire.worker(endpoints, fake)
    model, gradient = torch.zeros(numel), torch.ones(numel)
    exchange.join(hello(fake.layout), model)
    assert exchange.push(push(1, steps=0), gradient, model).refused is None
    assert exchange.push(push(2, incarnation="start-0"), gradient, model).refused == "another incarnation"
    assert [uploaded for _, uploaded in fake.pushed] == [False, False]
    assert server.bytes_received < 4 * numel
    assert torch.equal(model, torch.arange(numel, dtype=torch.float32))


@pytest.mark.parametrize("numel", [1, FRAME + 1, (2 * WINDOW + 3) * FRAME + 7])
def test_shared_values_have_a_length_of_their_own_and_come_between_pushes(
    open_wire: OpenWire, wire: WireHarness, numel: int
) -> None:
    fake, _, endpoints = open_wire(1000)
    exchange = wire.worker(endpoints, fake)
    model, values = torch.zeros(1000), torch.randn(numel)
    exchange.join(hello(fake.layout), model)
    for sequence in (1, 2):
        expected = 2 * values
        reply = exchange.share(Share(1, "life-1", sequence, "start-1", str(numel), merge=True), values)
        assert (reply.sequence, reply.shared) == (sequence, str(numel))
        assert torch.equal(values, expected)
        assert exchange.push(push(sequence), torch.ones(1000), model).version == sequence
    wait_for(lambda: fake.buffers.in_use == fake.shares[numel].in_use == 0, "all buffers are free")


def test_share_of_an_unknown_parameter_ends_the_session(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    with pytest.raises(ExchangeError, match="broke the protocol: no such parameter"):
        exchange.share(Share(1, "life-1", 1, "start-1", "7-9", merge=True), torch.zeros(3))


def test_four_workers_share_two_buffers(open_wire: OpenWire, wire: WireHarness) -> None:
    numel, rounds = 3 * FRAME + 5, 5
    fake, _, endpoints = open_wire(numel)

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


def test_ipc_and_tcp_reach_the_same_server(wire: WireHarness) -> None:
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


def test_both_sides_count_the_same_bytes(open_wire: OpenWire, wire: WireHarness) -> None:
    numel = 5 * FRAME
    fake, server, endpoints = open_wire(numel)
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout), model)
    exchange.push(push(1), torch.ones(numel), model)
    assert 4 * numel < exchange.bytes_sent < 4 * numel + 10_000
    assert 8 * numel < exchange.bytes_received < 8 * numel + 10_000
    exchange.close()
    wait_for(lambda: fake.lost_sessions, "the goodbye arrives")
    # The goodbye itself, and perhaps a ping, are in one count only.
    assert abs(server.bytes_received - exchange.bytes_sent) < 1000
    assert abs(server.bytes_sent - exchange.bytes_received) < 1000


def test_recall_is_sent_with_the_heartbeat(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    exchange.check()
    assert exchange.recalled_version == -1
    fake.recalled = {1: 3}
    wait_for(lambda: exchange.recalled_version == 3, "the recall arrives")
    exchange.check()


def test_goodbye_is_reported_once(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    exchange.close()
    exchange.close()
    wait_for(lambda: fake.lost_sessions, "the goodbye arrives")
    server.close()
    assert fake.lost_sessions == [(1, "life-1", "it said goodbye")]
    assert server.rejected_messages == 0


def test_reason_of_a_goodbye_is_reported_in_one_printable_line(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    exchange.close("it ended with ValueError:\n\ta\x1b[31m bad \udc80 batch " + "x" * 1000)
    wait_for(lambda: fake.lost_sessions, "the goodbye arrives")
    server.close()
    [(_, _, reason)] = fake.lost_sessions
    assert reason.startswith("it ended with ValueError: a [31m bad ? batch xxx")
    assert len(reason) <= MAX_REASON_BYTES
    assert server.rejected_messages == 0


def test_worker_with_another_model_is_refused_with_the_first_differences(
    open_wire: OpenWire, wire: WireHarness
) -> None:
    fake, server, endpoints = open_wire()
    other = layout_of(1001, "bias")
    exchange = wire.worker(endpoints, fake, layout=other)
    with pytest.raises(ExchangeError, match=r"(?s)worker 1 differs from rank 0.*parameter 0: .*1001.*here.*weight"):
        exchange.join(hello(other), torch.zeros(1001))
    assert not fake.joined
    assert server.rejected_messages == 1, "the server counts it"


def test_hello_of_another_protocol_version_is_refused(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    with pytest.raises(ExchangeError, match=f"speaks protocol 99, the server {PROTOCOL_VERSION}.*install the same"):
        exchange.join(Hello(99, 1, "life-1", fake.layout.fingerprint), torch.zeros(1000))
    assert not fake.joined


def test_refusal_ends_join(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire()
    fake.refusal = "training is over"
    with pytest.raises(ExchangeError, match="training is over"):
        wire.worker(endpoints, fake).join(hello(fake.layout), torch.zeros(1000))


def test_refusal_is_read_after_the_connection_has_ended(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    fake.channels[1].refuse("rank 0 ended with ValueError: a bad batch")
    server.close()
    connection = exchange._connection
    assert connection is not None
    wait_for(lambda: connection._monitor.poll(0), "the worker's connection has ended")
    with pytest.raises(ExchangeError, match="rank 0 ended with ValueError: a bad batch"):
        exchange.check()


def test_refusal_ends_a_waiting_push(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(1000)
    exchange.join(hello(fake.layout), model)
    fake.answering.clear()
    refuse = threading.Timer(0.1, lambda: fake.channels[1].refuse("a newer session has taken its place"))
    refuse.start()
    with pytest.raises(ExchangeError, match="a newer session has taken its place"):
        exchange.push(push(1), torch.ones(1000), model)
    refuse.join()
    fake.answering.set()
    exchange.close()
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    assert not fake.lost_sessions


def test_refusal_is_noticed_between_pushes(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    fake.channels[1].refuse("a newer session has taken its place")
    with pytest.raises(ExchangeError, match="a newer session has taken its place"):
        wait_for(lambda: exchange.check(), "the refusal arrives")


def test_running_download_is_finished_before_the_server_closes(open_wire: OpenWire, wire: WireHarness) -> None:
    numel = 6 * WINDOW * FRAME
    fake, server, endpoints = open_wire(numel)
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


def test_channel_of_a_closed_server_releases_the_buffers_it_is_given(wire: WireHarness) -> None:
    fake, server = wire.server()
    exchange = wire.worker(server.local_endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    server.close()
    fake.answer(7, None, fake.channels[1])
    fake.channels[1].refuse("too late")
    assert fake.buffers.in_use == 0


def test_no_descriptor_stays_open_after_many_runs(wire: WireHarness) -> None:
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


def test_endpoints_can_be_pickled_and_never_show_their_secrets(wire: WireHarness) -> None:
    _, server = wire.server(ipc=True, tcp=True, encrypt=True, token="a-secret-token")
    for endpoints in (server.local_endpoints, server.endpoints):
        assert endpoints is not None
        copy = pickle.loads(pickle.dumps(endpoints))
        assert copy == endpoints
        assert endpoints.address in repr(copy)
        for secret in (endpoints.token, endpoints.server_key, endpoints.public_key, endpoints.secret_key):
            assert secret is None or secret not in repr(copy)


def test_port_in_use_is_named(wire: WireHarness) -> None:
    _, first = wire.server(ipc=False, tcp=True)
    assert first.endpoints is not None
    port = int(first.endpoints.address.rpartition(":")[2])
    with pytest.raises(RuntimeError, match=rf"exchange.port={port} is in use.*exchange.port=0"):
        wire.server(ipc=False, tcp=True, port=port)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "ipc://@async_localsgd_nobody", "tcp://no.such.host.invalid:9"]
)
def test_unreachable_server_is_named_with_the_timeout(wire: WireHarness, address: str) -> None:
    fake, server = wire.server()
    assert server.local_endpoints is not None
    nowhere = Endpoints(address, "start-1", server.local_endpoints.token)
    exchange = wire.worker(nowhere, fake, connect_timeout=0.5)
    with pytest.raises(ExchangeError, match=f"{address} could not be reached within 0.5 s: .*exchange.port"):
        exchange.join(hello(fake.layout), torch.zeros(1000))


def test_invalid_options_are_named(wire: WireHarness) -> None:
    fake, server = wire.server()
    with pytest.raises(ValueError, match="silence_timeout=0 must be a positive"):
        WireServer(fake, silence_timeout=0)
    with pytest.raises(ValueError, match="ipc=False and tcp=False"):
        WireServer(fake, ipc=False, silence_timeout=1.0)
    with pytest.raises(ValueError, match="connect_timeout=-1 must be a positive"):
        wire.worker(server.local_endpoints, fake, connect_timeout=-1)
    exchange = wire.worker(server.local_endpoints, fake)
    with pytest.raises(ValueError, match="999 elements, the layout needs 1000"):
        exchange.join(hello(fake.layout), torch.zeros(999))


def test_several_leases_can_be_requested_at_once(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(1000))
    fake.answering.clear()
    answers = [exchange.request_lease(lease_request(number)) for number in (1, 2, 3)]
    wait_for(lambda: len(fake.lease_requests) == 3, "the requests arrive")
    fake.answering.set()
    assert [answer.result(PATIENCE).start for answer in answers] == [1, 2, 3]
    assert fake.lease_requests == [lease_request(1), lease_request(2), lease_request(3)]
    assert server.rejected_messages == 0


def test_lease_does_not_wait_for_a_download(open_wire: OpenWire, wire: WireHarness) -> None:
    numel = 4 * WINDOW * FRAME
    fake, server, endpoints = open_wire(numel)
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(numel))
    # Another worker, which reads nothing of the model that is sent to it.
    raw = wire.raw(endpoints)
    raw.say_hello(fake.layout, 2, "life-2")
    wait_for(lambda: server.bytes_sent > 4 * numel + WINDOW * FRAME_BYTES, "a window of the model is sent")
    assert exchange.request_lease(lease_request(1)).result(PATIENCE).start == 1


def test_lease_can_be_requested_between_join_and_close_only(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire()
    exchange = wire.worker(endpoints, fake)
    with pytest.raises(ExchangeError, match=r"call join\(\) before request_lease"):
        exchange.request_lease(lease_request(1))
    exchange.join(hello(fake.layout), torch.zeros(1000))
    fake.answering.clear()
    answer = exchange.request_lease(lease_request(1))
    exchange.close()
    with pytest.raises(ExchangeError, match="is closed"):
        answer.result(PATIENCE)
    with pytest.raises(ExchangeError, match="is closed"):
        exchange.request_lease(lease_request(2))
