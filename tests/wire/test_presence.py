"""Who counts as present when connections break, close for a while, fall silent, and come back."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.buffers import BufferPool
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.layout import Layout
from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.server import Server
from lightning_async_localsgd.wire import Endpoints, WireServer, frames
from lightning_async_localsgd.wire import presence as presence_module
from lightning_async_localsgd.wire.silence import Silence
from tests.wire import programs
from tests.wire.fakes import PATIENCE, FakeServer, RawWorker, Wire, ask, hello, push, wait_for
from tests.wire.programs import Start

Open = Callable[..., tuple[FakeServer, WireServer, Endpoints]]
FRAME = frames.FRAME_BYTES // 4


def beat(heart: RawWorker, worker: int = 1, session: str = "life-1") -> None:
    heart.say(frames.BEAT + frames.Beat(worker, session, "00").encode())
    heart.hear(frames.ANSWER)


def test_a_silence_is_too_long_after_the_limit_which_grows_with_what_was_survived() -> None:
    silence = Silence(10.0, now=100.0)
    assert not silence.too_long(110.0)
    assert silence.too_long(110.1)
    silence.hear(105.0)
    assert silence.limit == 15.0
    silence.hear(120.0)
    assert silence.limit == 45.0
    silence.hear(121.0)
    assert (silence.limit, silence.seconds(125.0)) == (45.0, 4.0)
    silence.hear(5000.0)
    assert silence.limit == 100.0
    silence.excuse(9000.0)
    assert not silence.too_long(9100.0)
    silence.hear(9001.0)
    assert silence.limit == 100.0


def test_of_the_sessions_that_are_lost_a_bounded_number_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "MOST_DEPARTED", 3)
    fake = FakeServer(1)
    presences = presence_module.Presences(fake, 10.0, lambda peer: None)
    stays = presences.greet(hello(fake.layout, 0, "stays"), 0.0)
    for number in range(1, 9):
        presences.depart(presences.greet(hello(fake.layout, number, f"life-{number}"), 0.0), "killed")
    assert [presence.worker for presence in presences] == [0, 6, 7, 8]
    presences.beat("heart", frames.Beat(7, "life-7", "00"), 1.0)
    assert fake.revived == [(7, "life-7")]
    presences.beat("heart", frames.Beat(1, "life-1", "00"), 1.0)
    assert fake.revived == [(7, "life-7")]
    assert not stays.departed
    fake.close()


def test_a_session_is_there_while_one_of_its_connections_is(way: Open, wire: Wire) -> None:
    fake, server, endpoints = way(1)
    bulk, heart = wire.raw(endpoints), wire.raw(endpoints)
    bulk.greet(fake.layout)
    beat(heart)
    bulk.close()
    again = wire.raw(endpoints)
    again.greet(fake.layout)
    beat(heart)
    assert not fake.departed
    heart.close()
    heart = wire.raw(endpoints)
    beat(heart)
    again.close()
    # Who asks for data is counted on, too.
    heart.say(frames.ASK + ask(1).encode())
    heart.hear(frames.LEASE)
    assert not fake.departed
    heart.close()
    wait_for(lambda: fake.departed, "nothing of it is left")
    assert fake.departed == [(1, "life-1", "its connection ended")]
    assert not fake.revived
    assert server.rejected_messages == 0


def test_a_beat_brings_a_session_back_and_a_hello_does(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way(1)
    bulk = wire.raw(endpoints)
    bulk.greet(fake.layout)
    bulk.close()
    wait_for(lambda: fake.departed, "its end")
    heart = wire.raw(endpoints)
    beat(heart)
    beat(heart)
    assert fake.revived == [(1, "life-1")]
    heart.close()
    wait_for(lambda: len(fake.departed) == 2, "its end")
    wire.raw(endpoints).greet(fake.layout)
    heart = wire.raw(endpoints)
    beat(heart)
    assert len(fake.revived) == 1
    assert len(fake.joined) == 2
    # Of others nothing is known.
    beat(heart, 2, "life-2")
    assert len(fake.revived) == 1


def test_a_connection_over_which_nothing_comes_any_more_does_not_hide_an_end(way: Open, wire: Wire) -> None:
    fake, _, endpoints = way(1, silence_timeout=1.0)
    bulk, old, new = (wire.raw(endpoints) for _ in range(3))
    bulk.greet(fake.layout)
    bulk.hear(frames.MODEL)
    bulk.say(frames.pack_part(frames.CREDIT, 1, 1))
    beat(old)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        beat(new)
        time.sleep(0.05)
    bulk.close()
    new.close()
    wait_for(lambda: fake.departed, "its end")
    assert fake.departed == [(1, "life-1", "its connection ended")]
    # A beat over the old one is as good as any. It is answered before anything follows from it.
    beat(old)
    wait_for(lambda: fake.revived == [(1, "life-1")], "it is back")


@pytest.mark.parametrize("end", ["goodbye", "nonsense", "refused", "superseded"])
def test_a_session_that_has_ended_for_good_is_not_brought_back_by_its_heart(way: Open, wire: Wire, end: str) -> None:
    fake, _, endpoints = way(1)
    bulk, heart = wire.raw(endpoints), wire.raw(endpoints)
    bulk.greet(fake.layout)
    beat(heart)
    if end == "goodbye":
        bulk.say(frames.BYE)
        wait_for(lambda: fake.departed, "it is gone")
    elif end == "nonsense":
        bulk.say(b"?")
        bulk.hear(frames.REFUSE)
    elif end == "refused":
        fake.outlets[1].refuse("quarantined")
        bulk.hear(frames.REFUSE)
    else:
        heart.close()
        bulk.close()
        wait_for(lambda: fake.departed, "it is gone")
        wire.raw(endpoints).greet(fake.layout, session="life-2")
        heart = wire.raw(endpoints)
    told = len(fake.departed)
    beat(heart)
    heart.close()
    another = wire.raw(endpoints)
    beat(another)
    assert not fake.revived
    assert len(fake.departed) == told == (0 if end == "refused" else 1)


def test_a_road_that_is_closed_for_a_while_costs_nothing(wire: Wire) -> None:
    fake, server = wire.server(30 * FRAME, ipc=False, tcp=True)
    road, endpoints = wire.road(server.endpoints)
    exchange = wire.worker(endpoints, fake)
    model = torch.zeros(fake.layout.numel)
    exchange.join(hello(fake.layout), model)
    # Between two pushes: both connections break, and new ones are not let through.
    road.cut()
    wait_for(lambda: len(fake.departed) == 1, "its end is noticed")
    exchange.check()
    exchange.request_lease(ask(1))
    road.restore()
    assert exchange.take_lease(1).start == 1
    wait_for(lambda: fake.revived == [(1, "life-1")], "it is back before it has anything to push")
    assert exchange.push(push(1), torch.ones(len(model)), model).refused is None
    # In the middle of one.
    road.throttle(20e6)
    with ThreadPoolExecutor(1) as pool:
        received = server.bytes_received
        pushing = pool.submit(exchange.push, push(2), torch.ones(len(model)), model)
        wait_for(lambda: server.bytes_received > received + 5 * frames.FRAME_BYTES, "it is in the middle")
        road.cut()
        wait_for(lambda: len(fake.departed) == 2, "its end is noticed")
        wait_for(lambda: fake.buffers.in_use == 0, "its buffer is free")
        road.throttle(None)
        road.restore()
        assert pushing.result(PATIENCE).refused is None
    assert fake.version == 2
    assert torch.equal(model, fake.model)


def test_a_frozen_road_is_waited_for_and_longer_the_next_time(wire: Wire) -> None:
    fake, server = wire.server(FRAME, ipc=False, tcp=True, silence_timeout=1.0)
    road, endpoints = wire.road(server.endpoints)
    exchange = wire.worker(endpoints, fake, silence_timeout=30.0)
    model = torch.zeros(FRAME)
    exchange.join(hello(fake.layout), model)
    road.freeze()
    wait_for(lambda: fake.departed, "its silence is noticed")
    assert "silent for" in fake.departed[0][2]
    time.sleep(1.0)
    road.restore()
    wait_for(lambda: fake.revived, "it is back")
    exchange.check()
    # Now the server knows that it may take two seconds, and waits for three times as many.
    road.freeze()
    time.sleep(1.5)
    road.restore()
    exchange.check()
    reply = exchange.push(push(1), torch.ones(FRAME), model)
    assert (reply.version, reply.refused) == (1, None)
    assert len(fake.departed) == 1


@pytest.mark.parametrize("moment", ["round", "upload", "download"])
def test_a_worker_that_was_stopped_comes_back_and_its_round_counts_once(wire: Wire, start: Start, moment: str) -> None:
    numel = 40 * FRAME
    fake, server = wire.server(numel, silence_timeout=2.0)
    stopped = start(programs.worker, server.local_endpoints, numel, 1, 2.0)
    other = wire.worker(server.local_endpoints, fake)
    model = torch.zeros(numel)
    other.join(hello(fake.layout, 2, "life-2"), model)
    assert stopped.hears() == "joined"
    received, sent = server.bytes_received, server.bytes_sent
    if moment != "round":
        fake.answering.clear()
        assert stopped.told("push") == "pushing 1"
        if moment == "upload":
            wait_for(lambda: server.bytes_received > received + frames.FRAME_BYTES, "the upload starts")
        else:
            wait_for(lambda: fake.pushed, "the push arrives")
    os.kill(stopped.pid, signal.SIGSTOP)
    fake.answering.set()
    if moment == "download":
        wait_for(lambda: server.bytes_sent > sent + frames.FRAME_BYTES, "the download starts")
    wait_for(lambda: fake.departed, "its silence is noticed")
    assert fake.departed[0][:2] == (1, "life-1")
    # The others go on, with the memory that it held.
    wait_for(lambda: fake.buffers.in_use == 0, "all buffers are free")
    other.push(push(1, 2, "life-2"), torch.ones(numel), model)
    time.sleep(1.0)
    os.kill(stopped.pid, signal.SIGCONT)
    if moment == "round":
        wait_for(lambda: fake.revived, "it is back")
        assert stopped.told("push") == "pushing 1"
    said = stopped.hears().split()
    assert said[:2] == ["pushed", "1"]
    # A push that had arrived in time is not applied a second time.
    assert said[3:] == (["already", "applied"] if moment == "download" else ["None"])
    assert fake.version == 2
    stopped.pipe.send("end")
    wait_for(lambda: fake.departed[-1] == (1, "life-1", "it said goodbye"), "its goodbye")


class Scene:
    """The real server, reached by one worker through a proxy."""

    def __init__(self, wire: Wire, stack: contextlib.ExitStack, numel: int, **options: Any) -> None:
        self.layout = Layout.from_description([["weight", [numel], "torch.float32", "parameter"]])
        self.model = GlobalModel(self.layout, DelayedNesterov(), 1)
        self.coordinator = Coordinator(
            self.model, SpeedAwareSteps(5), GraceWindow(0.0), Budget(None), cohort=1, incarnation="start-1"
        )
        server = Server(self.coordinator, BufferPool(numel, most=3))
        stack.callback(server.close)
        self.wire = WireServer(server, ipc=False, tcp=True, **{"silence_timeout": 30.0, **options})
        stack.callback(self.wire.close)
        self.road, self.endpoints = wire.road(self.wire.endpoints)


@pytest.mark.parametrize("fault", ["break", "cut", "freeze"])
def test_the_real_server_counts_each_round_once_whatever_becomes_of_the_road(wire: Wire, fault: str) -> None:
    with contextlib.ExitStack() as stack:
        scene = Scene(wire, stack, 6 * FRAME, silence_timeout=0.5)
        exchange = wire.worker(scene.endpoints, scene, silence_timeout=30.0)
        model, gradient = torch.zeros(6 * FRAME), torch.ones(6 * FRAME)
        version = exchange.join(hello(scene.layout, 0), model).version
        with ThreadPoolExecutor(1) as pool:
            for sequence in range(1, 7):
                # Somewhere on the way there or, with the larger numbers, on the way back.
                if fault == "break":
                    scene.road.break_after(sequence * frames.FRAME_BYTES)
                header = replace(push(sequence, 0), base_version=version)
                pushing = pool.submit(exchange.push, header, gradient, model)
                if fault != "break":
                    time.sleep(0.002 * sequence)
                    getattr(scene.road, fault)()
                    time.sleep(0.8 if sequence % 3 == 0 else 0.1)
                    scene.road.restore()
                reply = pushing.result(PATIENCE)
                assert reply.refused in (None, "already applied")
                assert reply.version == sequence
                version = reply.version
        exchange.close()
        assert scene.coordinator.totals[0].rounds == 6
        assert torch.equal(model, scene.model.theta)
