"""The server as remote workers see it: replies, join requests, lost and quarantined workers, observers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_async_localsgd.protocol.messages import JoinInfo
from lightning_async_localsgd.server.server import Server
from tests.harness import hello
from tests.observing import RecordingObserver
from tests.unit.server.serving import (
    RecordingChannel,
    filled,
    join_all,
    make_server,
    push_and_wait,
    push_of,
    request_join_info,
)


def test_remote_workers_share_one_buffer_which_returns_to_the_pool(servers: list[Server]) -> None:
    server = make_server(workers=2, total=100)
    servers.append(server)
    channels = [RecordingChannel(), RecordingChannel()]
    for number, channel in enumerate(channels):
        server.join(hello(number, f"s{number}", server.layout), channel)
    assert all(channel.answered.wait(10) for channel in channels)
    assert channels[0].leases[0] is channels[1].leases[0]
    model = torch.empty(server.layout.numel)
    server.copy_model(model)
    assert torch.equal(channels[0].leases[0].tensor, model)
    assert server._traffic.uploads.in_use == 1
    channels[0].leases[0].release()
    assert server._traffic.uploads.in_use == 1
    channels[1].leases[0].release()
    assert server._traffic.uploads.in_use == 0
    with pytest.raises(RuntimeError, match="more often"):
        channels[1].leases[0].release()


def test_dispatch_waits_for_a_buffer_without_stopping_the_server(servers: list[Server]) -> None:
    server = make_server(workers=1, total=100)
    servers.append(server)
    held = server._traffic.uploads.try_acquire()
    assert held is not None
    assert server._traffic.uploads.try_acquire() is None
    channel = RecordingChannel()
    server.join(hello(0, "s", server.layout), channel)
    assert server.live == [0]
    held.release()
    assert channel.answered.wait(10)
    assert channel.replies[0].local_steps == 5


def test_late_joiner_gets_the_join_info(servers: list[Server]) -> None:
    server = make_server(workers=2, total=10)
    servers.append(server)
    server.join_info = JoinInfo(
        workers=2, seed=7, fit_number=3, run_name="run", frozen_digest="hash", epoch=4, step_offset=5
    )
    expected = JoinInfo(2, 7, 3, "run", "hash", 4, 5, "this", "", 2)
    assert request_join_info(server, -1) == expected
    assert request_join_info(server, -1).worker == 3
    assert request_join_info(server, 1).worker == 1
    assert request_join_info(server, 1).refused is None
    assert "no worker 4" in (request_join_info(server, 4).refused or "")
    assert "no worker -2" in (request_join_info(server, -2).refused or "")
    channels = join_all(server, 2)
    for worker in (0, 1):
        server.push(push_of(worker, 1, 0), filled(server), channels[worker])
    _ = server.live
    assert channels[0].replies[-1].stop
    for worker in (-1, 1):
        assert "training is over" in (request_join_info(server, worker).refused or "")


def test_lost_worker_is_sent_nothing_and_continues_when_it_is_back(servers: list[Server]) -> None:
    server = make_server(workers=2, total=None)
    servers.append(server)
    channels = join_all(server, 2)
    server.lost(1, "s1", "it was silent")
    assert server.live == [0]
    server.revive(1, "s1")
    assert server.live == [0, 1]
    assert channels[1].refusals == []
    # It has no connection yet, so that an answer which is due now goes nowhere.
    again = RecordingChannel()
    server.join(hello(1, "s1", server.layout, reconnecting=True), again)
    push_and_wait(server, push_of(1, 1, 0), again)
    assert again.replies[-1].refused is None
    server.lost(1, "s1", "its connection ended")
    server.revive(1, "s1")
    push_and_wait(server, push_of(1, 2, 1), again)
    assert again.replies[-1].refused is None
    server.revive(1, "another")
    server.revive(7, "s7")
    assert server.live == [0, 1]


def test_quarantined_worker_is_refused_and_listed(servers: list[Server]) -> None:
    server = make_server(workers=2, total=None)
    servers.append(server)
    channels = join_all(server, 2)
    assert server.quarantined == frozenset()
    for sequence in range(1, 6):
        version = channels[1].replies[-1].version
        push_and_wait(server, push_of(1, sequence, version), channels[1], float("nan"))
    assert "quarantined" in channels[1].refusals[0]
    _ = server.live
    assert server.quarantined == {1}
    assert server.snapshot.refusals == {"not_finite": 5}
    assert "quarantined" in (request_join_info(server, 1).refused or "")
    newer = RecordingChannel()
    server.join(hello(1, "newer", server.layout), newer)
    assert newer.answered.wait(10)
    assert newer.refusals == channels[1].refusals
    push_and_wait(server, push_of(0, 1, 0), channels[0])
    assert channels[0].replies[-1].refused is None


def test_all_observers_see_the_same(servers: list[Server]) -> None:
    first, second, later = RecordingObserver(), RecordingObserver(), RecordingObserver()
    server = make_server(workers=1, total=None, observers=[first, second])
    servers.append(server)
    (channel,) = join_all(server, 1)
    for sequence in range(1, 5):
        if sequence == 3:
            server.add_observer(later)
        push_and_wait(server, push_of(0, sequence, sequence - 1), channel)
    _ = server.live
    assert [push.sequence for push in first.pushes] == [1, 2, 3, 4]
    assert [push.version for push in first.pushes] == [1, 2, 3, 4]
    assert [event.kind for event in first.events[:3]] == ["begin", "join", "dispatch"]
    assert (second.pushes, second.events) == (first.pushes, first.events)
    assert later.pushes == first.pushes[2:]
    assert later.events == first.events[-len(later.events) :]


def test_unread_metrics_are_bounded(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_async_localsgd.server.observers._MAX_METRICS", 2)
    server = make_server(workers=1, total=None)
    servers.append(server)
    (channel,) = join_all(server, 1)
    for sequence in range(1, 5):
        push_and_wait(server, dataclasses.replace(push_of(0, sequence, sequence - 1), metrics="{}"), channel)
    assert server.received_metrics.qsize() == 2
    assert "are dropped" in caplog.text


def test_names_of_optimizer_files_can_be_read(servers: list[Server]) -> None:
    server = make_server(workers=1, total=None)
    servers.append(server)
    (channel,) = join_all(server, 1)
    push_and_wait(server, dataclasses.replace(push_of(0, 1, 0), optimizer_file="worker-0.pt"), channel)
    assert server.optimizer_files == {0: "worker-0.pt"}
    assert server.state_dict()["optimizer_files"] == {"0": "worker-0.pt"}


def test_log_says_why_a_worker_is_refused_for_which_rank_0_waits(
    servers: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(workers=2, total=100)
    servers.append(server)
    channel = RecordingChannel()
    server.join(dataclasses.replace(hello(1, "s", server.layout), upload="int4"), channel)
    assert server.missing == [0, 1]
    [reason] = channel.refusals
    assert f"a process that wants to join as worker 1 is refused: {reason}" in caplog.messages
