"""Joining with nothing but an address and the token."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import zmq

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.messages import PROTOCOL_VERSION, Facts, Knock
from lightning_async_localsgd.wire import Endpoints, WireServer, frames
from lightning_async_localsgd.wire.knock import knock, signed
from tests.wire.fakes import FakeServer, Wire, hello, push, wait_for

Open = Callable[..., tuple[FakeServer, WireServer, Endpoints]]

TOKEN = "what only they know"


def ask(endpoints: Endpoints, worker: int = -1, timeout: float = 30.0, **changes: object) -> tuple[Endpoints, Facts]:
    asked: dict[str, object] = {"address": endpoints.address, "token": TOKEN, **changes}
    encrypted = asked.pop("encrypted", endpoints.encrypted)
    address, token = str(asked["address"]), str(asked["token"])
    return knock(address, token, worker, encrypted=bool(encrypted), timeout=timeout)


def test_the_address_and_the_token_are_enough_to_join(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way(token=TOKEN)
    found, facts = ask(endpoints)
    assert found == endpoints
    assert (facts.worker, facts.workers, facts.folder, facts.refused) == (101, 2, "the-run", None)
    assert fake.introduced == [-1]
    exchange = wire.worker(found, fake)
    model = torch.zeros(1000)
    exchange.join(hello(fake.layout, facts.worker), model)
    assert exchange.push(push(1, facts.worker), torch.ones(1000), model).version == 1
    assert server.rejected_messages == server.rejected_connections == 0


def test_a_worker_that_comes_back_keeps_its_number(way: Open) -> None:
    fake, _, endpoints = way(token=TOKEN)
    assert ask(endpoints, worker=3)[1].worker == 3
    assert fake.introduced == [3]


def test_a_wrong_token_is_refused_and_not_shown(way: Open) -> None:
    fake, _, endpoints = way(token=TOKEN)
    # A server that speaks CURVE does not even understand whoever has another key, and cannot tell why.
    with pytest.raises(ExchangeError, match=r"does not accept this worker's token|could not be reached") as refused:
        ask(endpoints, token="what others know", timeout=1.0)
    assert "what others know" not in str(refused.value)
    assert not fake.introduced


def test_encryption_on_one_side_only_is_named(wire: Wire) -> None:
    for encrypted in (False, True):
        _, server = wire.server(ipc=False, tcp=True, encrypt=encrypted, token=TOKEN)
        assert server.endpoints is not None
        with pytest.raises(ExchangeError, match="unencrypted there, too" if encrypted else "is encrypted there, too"):
            ask(server.endpoints, encrypted=not encrypted, timeout=0.5)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "ipc://@async_localsgd_nobody", "tcp://no.such.host:9"])
def test_an_address_where_nobody_is_is_named(address: str) -> None:
    with pytest.raises(ExchangeError, match=f"server at {address} could not be reached within 0.5 s"):
        knock(address, TOKEN, -1, encrypted=False, timeout=0.5)


def test_a_refusal_says_why(way: Open) -> None:
    fake, _, endpoints = way(token=TOKEN)
    fake.refusing = "training is over"
    with pytest.raises(ExchangeError, match="refuses: training is over"):
        ask(endpoints)


def test_a_server_that_does_not_answer_is_given_up(way: Open) -> None:
    fake, _, endpoints = way(token=TOKEN)
    fake.introduce = lambda worker, answer: None  # type: ignore[method-assign]
    with pytest.raises(ExchangeError, match="lets us in, but does not answer"):
        ask(endpoints, timeout=0.5)


def test_another_protocol_is_refused_whatever_its_knock_looks_like(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way(token=TOKEN)
    stranger = wire.raw(endpoints)
    stranger.say(frames.KNOCK + b'{"protocol": 99}')
    assert f"protocol 99, the server {PROTOCOL_VERSION}".encode() in stranger.hear(frames.REFUSE)[0]
    assert not fake.introduced


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"{}",
        b"[" * 50_000,
        Knock(PROTOCOL_VERSION, -2, "00").encode(),
        Knock(PROTOCOL_VERSION, -1, "0" * 65).encode(),
        b'{"protocol": %d, "worker": 1, "nonce": "\\ud800"}' % PROTOCOL_VERSION,
    ],
    ids=["empty", "no fields", "deep", "number", "nonce", "no text"],
)
def test_a_knock_that_is_none_is_counted(way: Open, wire: Wire, said: bytes) -> None:
    fake, server, endpoints = way(token=TOKEN)
    stranger = wire.raw(endpoints)
    stranger.say(frames.KNOCK + said)
    stranger.hear(frames.UNKNOWN)
    assert server.rejected_messages == 1
    assert not fake.introduced
    assert ask(endpoints)[1].worker == 101


def test_who_knocks_again_without_waiting_is_not_listened_to(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way(token=TOKEN)
    answers = []
    fake.introduce = lambda worker, answer: answers.append(answer)  # type: ignore[method-assign]
    stranger = wire.raw(endpoints)
    for _ in range(10):
        stranger.say(frames.KNOCK + Knock(PROTOCOL_VERSION, -1, "00").encode())
    wait_for(lambda: server.rejected_messages == 9, "the others are refused")
    assert len(answers) == 1
    stranger.close()
    answers[0](Facts("start-1", "", 5, 2, 0, 1, "", ""))  # Nobody is there to hear it.


def test_what_an_impostor_tells_is_not_believed() -> None:
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
            identity, said = router.recv_multipart()
            assert TOKEN.encode() not in said
            told = Facts("start-1", "", 1, 2, 0, 1, "folder", "")
            # What a server with another token has said to the same question, and what nobody has said.
            told = signed(told, "another token", Knock.decode(said[1:]).nonce)
            router.send_multipart([identity, frames.FACTS + told.encode()])

        with ThreadPoolExecutor(1) as pool:
            playing = pool.submit(impostor)
            with pytest.raises(ExchangeError, match="does not know the token"):
                knock(address, TOKEN, -1, encrypted=False, timeout=30.0)
            playing.result()
    finally:
        context.destroy(0)


def test_every_word_of_the_answer_is_proven() -> None:
    told = signed(Facts("start-1", "", 1, 2, 3, 4, "folder", "hash"), TOKEN, "nonce")
    for changed in ({"worker": 2}, {"seed": 0}, {"folder": "x"}, {"unshared": "x"}, {"refused": ""}, {"fit": 5}):
        assert signed(replace(told, **changed), TOKEN, "nonce").proof != told.proof  # type: ignore[arg-type]
    assert signed(told, TOKEN, "another").proof != told.proof
    assert signed(told, TOKEN, "nonce") == told
