"""Processes that die or freeze, connections that break, peers that stall: who is told what, and what remains."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import zmq

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.messages import Push
from lightning_async_localsgd.wire import Endpoints, WireServer, frames
from tests.proxy import Proxy
from tests.wire import programs
from tests.wire.fakes import PATIENCE, FakeServer, Wire, ask, hello, listening, push, wait_for
from tests.wire.programs import Start

Open = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
FRAME = frames.FRAME_BYTES // 4


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Everything that could be a file, a socket file or shared memory of ours."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def found() -> list[Path]:
        shared = [path for path in Path("/dev/shm").iterdir() if "async_localsgd" in path.name]
        # multiprocessing's own pipe lives in a folder of its own.
        return shared + [path for path in tmp_path.iterdir() if not path.name.startswith("pymp-")]

    return found


# ------------------------------------------------------------------- processes


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_worker_killed_in_mid_round_is_noticed_at_once(
    wire: Wire, start: Start, kind: str, files: Callable[[], list[Path]]
) -> None:
    # Silence would only be noticed long after this test has given up.
    fake, server = wire.server(FRAME, ipc=kind == "ipc", tcp=kind == "tcp", silence_timeout=10 * PATIENCE)
    endpoints = server.local_endpoints or server.endpoints
    victims = [start(programs.worker, endpoints, FRAME, number, 600.0) for number in (1, 2)]
    assert [victim.hears() for victim in victims] == ["joined", "joined"]
    assert victims[0].told("push") == "pushing 1"
    assert victims[0].hears() == "pushed 1 1 None"
    victims[0].killed()
    wait_for(lambda: fake.departed, "its end is noticed")
    assert fake.departed == [(1, "life-1", "its connection ended")]
    assert victims[1].told("push") == "pushing 1"
    assert victims[1].hears() == "pushed 1 2 None"
    victims[1].pipe.send("end")
    wait_for(lambda: len(fake.departed) == 2, "its goodbye")
    assert fake.departed[1] == (2, "life-2", "it said goodbye")
    assert not files()


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
@pytest.mark.parametrize("moment", ["upload", "wait", "download"])
def test_a_worker_killed_in_an_exchange_leaves_nothing(wire: Wire, start: Start, kind: str, moment: str) -> None:
    # Large enough that a worker that is stopped in mid-transfer cannot have it all in the system's buffers.
    numel = 60 * FRAME
    fake, server = wire.server(numel, ipc=kind == "ipc", tcp=kind == "tcp", silence_timeout=10 * PATIENCE)
    endpoints = server.local_endpoints or server.endpoints
    victim = start(programs.worker, endpoints, numel, 1, 600.0)
    assert victim.hears() == "joined"
    received, sent = server.bytes_received, server.bytes_sent
    fake.answering.clear()
    assert victim.told("push") == "pushing 1"
    if moment == "upload":
        wait_for(lambda: server.bytes_received > received + 2 * frames.FRAME_BYTES, "the upload starts")
        os.kill(victim.pid, signal.SIGSTOP)
    else:
        wait_for(lambda: fake.pushed, "the push arrives")
    if moment == "download":
        os.kill(victim.pid, signal.SIGSTOP)
        fake.answering.set()
        wait_for(lambda: server.bytes_sent > sent + 2 * frames.FRAME_BYTES, "the download starts")
    victim.killed()
    wait_for(lambda: fake.departed, "its end is noticed")
    assert fake.departed == [(1, "life-1", "its connection ended")]
    fake.answering.set()
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout, 2, "life-2"), model)
    exchange.push(push(1, 2, "life-2"), torch.ones(numel), model)
    assert torch.equal(model, fake.model)


@pytest.mark.parametrize("way_in", [0, 1], ids=["ipc", "tcp"])
@pytest.mark.parametrize("moment", ["round", "wait", "lease"])
def test_a_worker_of_a_killed_server_ends_and_nothing_remains(
    wire: Wire, start: Start, way_in: int, moment: str, files: Callable[[], list[Path]]
) -> None:
    host = start(programs.server, FRAME)
    endpoints = host.hears()[way_in]
    client = FakeServer(FRAME)
    exchange = wire.worker(endpoints, client, silence_timeout=600.0)
    model = torch.zeros(FRAME)
    exchange.join(hello(client.layout), model)
    client.close()
    if moment == "round":
        host.killed()
        with pytest.raises(ExchangeError, match=f"the server at {endpoints.address} is gone"):
            wait_for(lambda: exchange.check(), "the end is noticed")
    elif moment == "lease":
        assert host.told("hold") == "holding"
        exchange.request_lease(ask(1))
        host.killed()
        with pytest.raises(ExchangeError, match=f"the server at {endpoints.address} is gone"):
            exchange.take_lease(1)
    else:
        assert host.told("hold") == "holding"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(exchange.push, push(1), torch.ones(FRAME), model)
            time.sleep(0.1)
            host.killed()
            with pytest.raises(ExchangeError, match=f"the server at {endpoints.address} is gone"):
                waiting.result(PATIENCE)
    exchange.close()
    assert not files()
    assert endpoints.address.removeprefix("ipc://") not in listening()


def test_a_frozen_worker_is_given_up_and_learns_it(wire: Wire, start: Start) -> None:
    fake, server = wire.server(FRAME, silence_timeout=0.5)
    frozen = start(programs.worker, server.local_endpoints, FRAME, 1, 30.0)
    assert frozen.hears() == "joined"
    os.kill(frozen.pid, signal.SIGSTOP)
    wait_for(lambda: fake.departed, "its silence is noticed")
    worker, session, reason = fake.departed[0]
    assert (worker, session) == (1, "life-1")
    assert "silent for" in reason or "connection ended" in reason
    fake.refusing = "the server had given it up"
    os.kill(frozen.pid, signal.SIGCONT)
    frozen.pipe.send("push")
    said = [frozen.hears(), frozen.hears()]
    assert said == ["pushing 1", "error the server had given it up"]
    assert len(fake.departed) == 1


# --------------------------------------------------------------------- silence


def test_a_worker_without_heartbeat_is_given_up(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way(silence_timeout=0.5)
    other = wire.worker(endpoints, fake, silence_timeout=0.5)
    other.join(hello(fake.layout, 2, "life-2"), torch.zeros(1000))
    silent = wire.raw(endpoints)
    silent.greet(fake.layout)
    wait_for(lambda: fake.departed, "the silence is noticed")
    assert fake.departed[0][:2] == (1, "life-1")
    assert "silent for" in fake.departed[0][2]
    wait_for(lambda: fake.buffers.in_use == 0, "the model that was on its way to it is taken back")


@pytest.mark.parametrize("moment", ["upload", "download"])
def test_a_peer_that_stalls_in_a_transfer_holds_nobody_up_and_is_given_up(way: Open, wire: Wire, moment: str) -> None:
    numel = 40 * FRAME
    fake, server, endpoints = way(numel, silence_timeout=2.0)
    stalled = wire.raw(endpoints)
    stalled.greet(fake.layout)
    if moment == "upload":
        stalled.say(frames.PUSH + push(1).encode())
        stalled.hear(frames.GO)
        stalled.say(frames.pack_part(frames.DATA, 1, 0), bytes(frames.FRAME_BYTES))
    else:
        stalled.hear(frames.MODEL)
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout, 2, "life-2"), model)
    for sequence in (1, 2):
        exchange.push(push(sequence, 2, "life-2"), torch.ones(numel), model)
    assert not fake.departed, "the others did not wait for its end"
    beat = frames.Beat(1, "life-1", "00").encode()
    deadline = time.monotonic() + PATIENCE
    while not fake.departed:
        # It lives, and says so: what counts is that its transfer does not move.
        stalled.say(frames.BEAT + beat)
        time.sleep(0.05)
        assert time.monotonic() < deadline
    assert fake.departed[0][:2] == (1, "life-1")
    assert f"stalled in mid-{moment}" in fake.departed[0][2]
    if moment == "upload":
        wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    stalled.close()
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    exchange.push(push(3, 2, "life-2"), torch.ones(numel), model)
    assert torch.equal(model, fake.model)
    assert server.rejected_messages == 0


def test_many_stalled_uploads_never_take_more_than_the_pool_has(wire: Wire) -> None:
    numel = 2 * FRAME
    fake, server = wire.server(numel, most=4)
    peers = []
    for number in range(1, 7):
        peer = wire.raw(server.local_endpoints)
        peer.greet(fake.layout, number, f"life-{number}")
        peer.hear(frames.MODEL)
        peer.hear(frames.MODEL)
        peer.say(frames.pack_part(frames.CREDIT, 1, 2))
        peers.append(peer)
    wait_for(lambda: fake.buffers.in_use == 0, "all models have arrived")
    for number, peer in enumerate(peers, start=1):
        peer.say(frames.PUSH + push(1, number, f"life-{number}").encode())
        if number <= 4:
            peer.hear(frames.GO)
    assert fake.buffers.in_use == 4
    assert not peers[4].socket.poll(300)
    peers[0].close()
    peers[4].hear(frames.GO)
    assert fake.buffers.in_use == 4


# ----------------------------------------------------------- broken connections


Road = tuple[FakeServer, WireServer, Proxy, Endpoints]
"""A server that is reached through a proxy, and how."""


@pytest.fixture(params=[False, True], ids=["plain", "curve"])
def road(request: pytest.FixtureRequest, wire: Wire) -> Road:
    fake, server = wire.server(30 * FRAME, ipc=False, tcp=True, encrypt=request.param)
    return fake, server, *wire.road(server.endpoints)


def test_a_push_goes_on_over_a_new_connection_and_counts_once(road: Road, wire: Wire) -> None:
    fake, server, way, endpoints = road
    numel = fake.layout.numel
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout), model)
    # In mid-upload.
    way.break_after(5 * frames.FRAME_BYTES)
    reply = exchange.push(push(1), torch.ones(numel), model)
    assert (reply.sequence, reply.version, reply.refused) == (1, 1, None)
    # Between two exchanges.
    way.break_()
    wait_for(lambda: fake.departed, "the break is noticed")
    exchange.check()
    reply = exchange.push(push(2), torch.ones(numel), model)
    assert (reply.sequence, reply.version, reply.refused) == (2, 2, None)
    assert torch.equal(model, fake.model)
    assert [said.rejoining for said in fake.joined] == [False, True, True]
    assert {said.session for said in fake.joined} == {"life-1"}
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    assert server.rejected_messages == 0


def test_a_push_whose_answer_was_lost_is_sent_again_under_its_number(road: Road, wire: Wire) -> None:
    fake, _, way, endpoints = road
    numel = fake.layout.numel
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(numel)
    exchange.join(hello(fake.layout), model)
    fake.answering.clear()
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(exchange.push, push(1), torch.ones(numel), model)
        wait_for(lambda: fake.pushed, "the push arrives")
        way.break_()
        wait_for(lambda: len(fake.joined) == 2, "the worker is back")
        fake.answering.set()
        reply = pushing.result(PATIENCE)
    sent: list[Push] = [header for header, _ in fake.pushed]
    assert sent == [sent[0], sent[0]]
    assert (reply.version, reply.refused) == (1, "already applied")
    assert torch.equal(model, fake.model)
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")


def test_a_lease_that_was_lost_is_asked_for_again_under_its_number(road: Road, wire: Wire) -> None:
    fake, server, way, endpoints = road
    exchange = wire.worker(endpoints, fake)
    exchange.join(hello(fake.layout), torch.zeros(fake.layout.numel))
    fake.answering.clear()
    exchange.request_lease(ask(1))
    wait_for(lambda: fake.asked, "the request arrives")
    for breaks in (1, 2):
        way.break_()
        wait_for(lambda breaks=breaks: len(fake.asked) > breaks, "it is sent again")
    exchange.request_lease(ask(2))
    fake.answering.set()
    assert exchange.take_lease(1).start == 1
    assert exchange.take_lease(2).start == 2
    assert fake.asked == [ask(1), ask(1), ask(1), ask(2)]
    # While nobody is connected.
    way.break_()
    exchange.request_lease(ask(3))
    assert exchange.take_lease(3).start == 3
    assert server.rejected_messages == 0


def test_a_worker_whose_first_model_is_cut_off_joins_again(road: Road, wire: Wire) -> None:
    fake, server, way, endpoints = road
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(fake.layout.numel)
    with ThreadPoolExecutor(1) as pool:
        fake.answering.clear()
        joining = pool.submit(exchange.join, hello(fake.layout), model)
        wait_for(lambda: fake.joined, "the hello arrives")
        way.break_()
        fake.answering.set()
        assert joining.result(PATIENCE).version == 0
    assert torch.equal(model, fake.model)
    assert [said.rejoining for said in fake.joined] == [False, False]
    assert server.rejected_messages == 0


def test_a_server_that_falls_silent_is_gone_after_the_limit(road: Road, wire: Wire) -> None:
    fake, _, way, endpoints = road
    exchange = wire.worker(endpoints, fake, silence_timeout=1.0)
    model = torch.zeros(fake.layout.numel)
    exchange.join(hello(fake.layout), model)
    way.freeze()
    with pytest.raises(
        ExchangeError, match=r"has been silent for \d+ s; .* raise silence_timeout|is gone: .*, for 1 s"
    ):
        exchange.push(push(1), torch.ones(len(model)), model)
    with pytest.raises(ExchangeError, match="has been silent for"):
        wait_for(exchange.check, "the silence is noticed")


def test_a_session_that_dials_again_and_again_holds_no_buffers(way: Open, wire: Wire) -> None:
    # Large enough that it cannot all be in the system's buffers. Nobody reads it, and no end of a connection is seen.
    fake, _, endpoints = way(60 * FRAME)
    connections = []
    for _ in range(6):
        connections.append(wire.raw(endpoints))
        connections[-1].greet(fake.layout)
        connections[-1].hear(frames.REPLY)
    wait_for(lambda: fake.buffers.in_use <= 1, "what was on its way over the older connections is taken back")
    assert not fake.departed, "the session never left"


def test_a_newer_connection_of_the_same_session_takes_over(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way(FRAME)
    older, newer = wire.raw(endpoints), wire.raw(endpoints)
    older.greet(fake.layout)
    older.say(frames.PUSH + push(1).encode())
    older.hear(frames.GO)
    newer.greet(fake.layout)
    wait_for(lambda: fake.buffers.in_use <= 1, "the older upload's buffer is free")
    wait_for(lambda: not older.socket.poll(0, zmq.POLLOUT), "the older connection is closed from over there")
    newer.say(frames.PUSH + push(1).encode())
    newer.hear(frames.GO)
    newer.say(frames.pack_part(frames.DATA, 1, 0), bytes(frames.FRAME_BYTES))
    wait_for(lambda: len(fake.pushed) == 1, "the push arrives")
    assert not fake.departed, "the session never left"
    assert server.rejected_messages == 0
