"""Joining a run with an address and the token only."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import zmq

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, JoinInfo, JoinRequest
from lightning_async_localsgd.wire import Endpoints, WireServer, frames
from lightning_async_localsgd.wire.join_info import request_join_info, with_proof
from tests.wire.fakes import FakeServer, WireHarness, hello, push, wait_for

OpenWire = Callable[..., tuple[FakeServer, WireServer, Endpoints]]

TOKEN = "a token that only the run knows"


def request(
    endpoints: Endpoints, worker: int = -1, timeout: float = 30.0, **changes: object
) -> tuple[Endpoints, JoinInfo]:
    options: dict[str, object] = {"address": endpoints.address, "token": TOKEN, **changes}
    encrypted = options.pop("encrypted", endpoints.encrypted)
    address, token = str(options["address"]), str(options["token"])
    return request_join_info(address, token, worker, encrypted=bool(encrypted), timeout=timeout)


def test_address_and_token_are_enough_to_join(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire(token=TOKEN)
    joined, info = request(endpoints)
    assert joined == endpoints
    assert (info.worker, info.workers, info.run_name, info.refused) == (101, 2, "the-run", None)
    assert fake.join_requests == [-1]
    exchange = wire.worker(joined, fake)
    model = torch.zeros(1000)
    exchange.join(hello(fake.layout, info.worker), model)
    assert exchange.push(push(1, info.worker), torch.ones(1000), model).version == 1
    assert server.rejected_messages == server.rejected_connections == 0


def test_restarted_worker_keeps_its_number(open_wire: OpenWire) -> None:
    fake, _, endpoints = open_wire(token=TOKEN)
    assert request(endpoints, worker=3)[1].worker == 3
    assert fake.join_requests == [3]


def test_wrong_token_is_refused_and_not_shown(open_wire: OpenWire) -> None:
    fake, _, endpoints = open_wire(token=TOKEN)
    # A CURVE server does not understand a peer with another key, and cannot tell it why.
    with pytest.raises(ExchangeError, match=r"does not accept this worker's token|could not be reached") as refused:
        request(endpoints, token="a token of another run", timeout=1.0)
    assert "a token of another run" not in str(refused.value)
    assert not fake.join_requests


def test_encryption_on_one_side_only_is_named(wire: WireHarness) -> None:
    for encrypted in (False, True):
        _, server = wire.server(ipc=False, tcp=True, encrypt=encrypted, token=TOKEN)
        assert server.endpoints is not None
        with pytest.raises(ExchangeError, match="uses no encryption" if encrypted else "uses encryption"):
            request(server.endpoints, encrypted=not encrypted, timeout=0.5)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "ipc://@async_localsgd_nobody", "tcp://no.such.host:9"])
def test_address_without_a_server_is_named(address: str) -> None:
    with pytest.raises(ExchangeError, match=f"server at {address} could not be reached within 0.5 s"):
        request_join_info(address, TOKEN, -1, encrypted=False, timeout=0.5)


def test_refused_join_request_says_why(open_wire: OpenWire) -> None:
    fake, _, endpoints = open_wire(token=TOKEN)
    fake.refusal = "training is over"
    with pytest.raises(ExchangeError, match="refused: training is over"):
        request(endpoints)


def test_join_request_without_an_answer_times_out(open_wire: OpenWire) -> None:
    fake, _, endpoints = open_wire(token=TOKEN)
    fake.request_join_info = lambda worker, answer: None  # type: ignore[method-assign]
    with pytest.raises(ExchangeError, match="accepted the connection, but does not answer"):
        request(endpoints, timeout=0.5)


def test_join_request_of_another_protocol_version_is_refused(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire(token=TOKEN)
    peer = wire.raw(endpoints)
    peer.send(frames.JOIN_REQUEST + b'{"protocol": 99}')
    assert f"protocol 99, the server {PROTOCOL_VERSION}".encode() in peer.receive(frames.REFUSE)[0]
    assert not fake.join_requests


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{}",
        b"[" * 50_000,
        JoinRequest(PROTOCOL_VERSION, -2, "00").encode(),
        JoinRequest(PROTOCOL_VERSION, -1, "0" * 65).encode(),
        b'{"protocol": %d, "worker": 1, "nonce": "\\ud800"}' % PROTOCOL_VERSION,
    ],
    ids=["empty", "no fields", "deep", "number", "nonce", "no text"],
)
def test_invalid_join_request_is_counted(open_wire: OpenWire, wire: WireHarness, message: bytes) -> None:
    fake, server, endpoints = open_wire(token=TOKEN)
    peer = wire.raw(endpoints)
    peer.send(frames.JOIN_REQUEST + message)
    peer.receive(frames.UNKNOWN)
    assert server.rejected_messages == 1
    assert not fake.join_requests
    assert request(endpoints)[1].worker == 101


def test_second_unanswered_join_request_is_refused(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, server, endpoints = open_wire(token=TOKEN)
    answers = []
    fake.request_join_info = lambda worker, answer: answers.append(answer)  # type: ignore[method-assign]
    peer = wire.raw(endpoints)
    for _ in range(10):
        peer.send(frames.JOIN_REQUEST + JoinRequest(PROTOCOL_VERSION, -1, "00").encode())
    wait_for(lambda: server.rejected_messages == 9, "the other requests are refused")
    assert len(answers) == 1
    peer.close()
    answers[0](JoinInfo(2, 0, 1, "", "", incarnation="start-1", worker=5))  # The peer is gone.


def test_join_info_of_an_impostor_is_refused() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gate, router = context.socket(zmq.REP), context.socket(zmq.ROUTER)
    try:
        gate.bind("inproc://zeromq.zap.01")
        for option, value in ((zmq.PLAIN_SERVER, 1), (zmq.LINGER, 0)):
            router.setsockopt(option, value)
        router.setsockopt(zmq.ZAP_DOMAIN, b"async_localsgd")
        router.bind("tcp://127.0.0.1:*")
        address = router.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

        def impostor() -> None:
            version, request, *_ = gate.recv_multipart()
            gate.send_multipart([version, request, b"200", b"OK", b"", b""])
            identity, message = router.recv_multipart()
            assert TOKEN.encode() not in message
            info = JoinInfo(2, 0, 1, "run", "", incarnation="start-1", worker=1)
            # Signed with another token.
            info = with_proof(info, "another token", JoinRequest.decode(message[1:]).nonce)
            router.send_multipart([identity, frames.JOIN_INFO + info.encode()])

        with ThreadPoolExecutor(1) as pool:
            playing = pool.submit(impostor)
            with pytest.raises(ExchangeError, match="does not know the token"):
                request_join_info(address, TOKEN, -1, encrypted=False, timeout=30.0)
            playing.result()
    finally:
        context.destroy(0)


def test_proof_covers_every_field_of_the_join_info() -> None:
    info = with_proof(JoinInfo(2, 3, 4, "run", "hash", incarnation="start-1", worker=1), TOKEN, "nonce")
    for changed in (
        {"worker": 2},
        {"seed": 0},
        {"run_name": "x"},
        {"frozen_digest": "x"},
        {"refused": ""},
        {"fit_number": 5},
    ):
        assert with_proof(replace(info, **changed), TOKEN, "nonce").proof != info.proof  # type: ignore[arg-type]
    assert with_proof(info, TOKEN, "another").proof != info.proof
    assert with_proof(info, TOKEN, "nonce") == info
